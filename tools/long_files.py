"""The repository's text files -> exit code 1 and their names where one has more than 600 lines."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600
SKIP = {"LICENSE"}
SUFFIXES = {".py", ".md", ".toml", ".c", ".h", ".jinja", ".yml", ".yaml", ".html", ".css", ".js", ""}

listing = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
files = [ROOT / name for name in listing.splitlines() if Path(name).suffix in SUFFIXES and name not in SKIP]
lengths = {f: len(f.read_text(errors="replace").splitlines()) for f in files if f.is_file() and not f.is_symlink()}
long = {f: n for f, n in lengths.items() if n > LIMIT}
for file, count in long.items():
    print(f"{file.relative_to(ROOT)}: {count} lines; the limit is {LIMIT}: split it by job", file=sys.stderr)
sys.exit(bool(long))
