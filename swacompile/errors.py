"""What can be wrong with the user's input. Every message says what was expected, what was found, where, and what to do."""


class SwacompileError(Exception):
    """A mistake in the input that the user can mend. The command line prints it and exits with code 2."""


class ModelError(SwacompileError):
    """The model file cannot be read or is not one that swacompile understands."""


class OutputError(SwacompileError):
    """The output cannot be written, or writing it would destroy something."""


class TargetError(SwacompileError):
    """The hardware target is unknown or cannot be built for."""


class ToolchainError(SwacompileError):
    """A program that a build needs (a C++ compiler, nvcc) is missing or failed."""


class ArtifactError(SwacompileError):
    """A compiled folder is incomplete, damaged, or was made by another version."""


class ArgumentError(SwacompileError):
    """An option has a value that cannot be used."""
