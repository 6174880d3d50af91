"""Trainers turn a plan, a training record and a fold into weights: the loop, losses, augmentation, sampling, schedules."""

if __name__ == "trainers":
    raise ImportError("this folder is the package autoseg.trainers; import it by that name")
