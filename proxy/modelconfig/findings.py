"""What reading a configuration brings to light, each with the path of its key."""


class Findings:
    """Problems make the configuration unusable, warnings do not."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def problem(self, path: str, text: str) -> None:
        self.problems.append(f"{path}: {text}")

    def warn(self, path: str, text: str) -> None:
        self.warnings.append(f"{path}: {text}")
