"""Networks: described without torch, built with it."""
