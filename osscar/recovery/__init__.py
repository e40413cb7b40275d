"""Recovery: a smaller model is trained for some minutes towards the outputs of its dense one."""
