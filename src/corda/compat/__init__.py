"""Drop-in for PEFT's preprocess_corda: layers matched as PEFT does, folders kept, what PEFT reads."""

from corda.compat.preprocess import preprocess_corda

__all__ = ["preprocess_corda"]
