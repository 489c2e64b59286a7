"""The folders of the repository, for tests in any folder below this one."""

from pathlib import Path


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
EXAMPLES = ROOT / "examples"
CONVERSION = ROOT / "conversion"
