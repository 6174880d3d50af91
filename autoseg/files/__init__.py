"""Everything that touches the disk: images, the case store, run folders, the work folder."""
