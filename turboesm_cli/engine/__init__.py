"""Many sequences through the slots of a batch."""
