"""Methods x learning rates x seeds on one base, one task and one retention set, compared where that is fair."""
