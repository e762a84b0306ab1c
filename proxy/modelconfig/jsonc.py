"""Make YAML of a file that holds JSON with comments, or a piece of it.

A site configuration is JSON with ``//`` and ``/* */``. YAML reads JSON, but takes
such comments for text, wants no tabs and no comma between its own keys, and a key
copied from further inside has more indentation than the keys it now stands beside.
All of that becomes blanks here, so that errors still name the right line. Whether a
text needs this is for the caller to know: YAML that really means ``//`` would lose it.
"""

import re

# Both expressions match one token; what is left of an unquoted text is one token, so
# neither the slashes of a URL nor an apostrophe in a word begin anything.
_COMMENT = r"//[^\n]* | /\*.*?\*/"
_STRING = r""" "(?:[^"\\]|\\.)*" | '(?:[^']|'')*' """
_WORD = r"(?:true|false|null|-?\d[\d.eE+-]*)"

# Inside {} or [].
_FLOW = re.compile(
    rf"""
      (?P<noise>  {_COMMENT} | \t )
    | (?P<hash>   \#[^\n]* )
    | (?P<string> {_STRING} )
    | (?P<open>   [\[{{] )
    | (?P<close>  [\]}}] )
    | (?P<mark>   [\s,:] )
    | (?P<word>   {_WORD}(?=//|/\*) )
    | (?P<plain>  [^\s,\[\]{{}}]+ )
    """,
    re.VERBOSE | re.DOTALL,
)

# Outside, where a comma can only have been left by what was copied.
_BLOCK = re.compile(
    rf"""
      (?P<noise>  {_COMMENT} | [,\t] )
    | (?P<hash>   \#[^\n]* )
    | (?P<string> {_STRING} )
    | (?P<open>   [\[{{] )
    | (?P<close>  [\]}}] )
    | (?P<scalar> [|>][^\n]*\n )
    | (?P<colon>  :(?=[\[{{"]) )
    | (?P<mark>   \s | [-?:](?=\s) )
    | (?P<word>   {_WORD}(?=\s*,\s*(?:\n|//|/\*|\Z)) )
    | (?P<plain>  (?:(?!:\s|\s\#)[^\n])+ )
    """,
    re.VERBOSE | re.DOTALL,
)

_NO_KEY = ("noise", "hash", "mark")
_MARKS = re.compile(r" *(?:- +)*")
_CHARACTER = re.compile(r"[^\n]")
_COPIED_KEYS = ('"modelConfiguration"', '"cody.enabled"')


def to_yaml(text: str) -> str:
    """Return ``text`` with blanks for what belongs to JSON with comments alone."""
    cleaner = _Cleaner(text)
    cleaner.run()
    return cleaner.aligned()


class _Cleaner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.pieces: list[str] = []
        # Line -> column of its first token outside of {} and [].
        self.columns: dict[int, int] = {}
        self.copied: set[int] = set()

    def run(self) -> None:
        while self.at < len(self.text):
            match = (_FLOW if self.depth else _BLOCK).match(self.text, self.at)
            assert match is not None and match.lastgroup is not None
            if not self.depth and match.lastgroup not in _NO_KEY:
                self.note_column(match[0])
            self.at = match.end()
            self.take(match.lastgroup, match[0])

    def take(self, kind: str, piece: str) -> None:
        if kind == "noise":
            piece = _CHARACTER.sub(" ", piece)
        elif kind == "open":
            self.depth += 1
        elif kind == "close":
            self.depth = max(0, self.depth - 1)
        elif kind == "colon":
            # YAML's own keys want a blank, JSON does not.
            piece = ": "
        elif kind == "scalar":
            piece += self.block_scalar(self.at - len(piece))
        self.pieces.append(piece)

    def note_column(self, token: str) -> None:
        line = self.text.count("\n", 0, self.at)
        if line not in self.columns:
            start = self.text.rfind("\n", 0, self.at) + 1
            self.columns[line] = self.at - start
            if token in _COPIED_KEYS:
                self.copied.add(line)

    def block_scalar(self, header: int) -> str:
        """Take the lines of a ``|`` or ``>``: those with more indentation."""
        before = self.text[self.text.rfind("\n", 0, header) + 1 : header]
        marks = _MARKS.match(before)
        assert marks is not None
        # A mapping in a list begins after the dash, a text in a list at it.
        in_list = marks[0] == before and "-" in before
        indent = before.rfind("-") if in_list else marks.end()
        line = re.compile(rf" {{{indent + 1},}}[^\n]*(?:\n|\Z)|[ ]*\n")
        start = self.at
        while match := line.match(self.text, self.at):
            self.at = match.end()
        return self.text[start : self.at]

    def aligned(self) -> str:
        lines = "".join(self.pieces).split("\n")
        left = min(self.columns.values(), default=0)
        for number in self.copied:
            lines[number] = lines[number][self.columns[number] - left :]
        return "\n".join(lines)
