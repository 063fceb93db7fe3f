"""python -m docs.draw: make all pictures of docs/ anew, or those that are named.

Pictures of the demo are those that `make demo` has left in out/demo.
"""

import shutil
import sys
from pathlib import Path

from docs.draw import FIGURES, data_of, names, write

DEMO = Path("out/demo")
FROM_DEMO = {"answers.svg": "demo-answers.svg", "learning.svg": "demo-learning.svg"}

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or names():
        write(name, data_of(name), FIGURES / f"{name}.svg")
        print(f"docs/figures/{name}.svg")
    if not sys.argv[1:]:
        for source, target in FROM_DEMO.items():
            if (DEMO / source).exists():
                shutil.copy(DEMO / source, FIGURES.parent / target)
                print(f"docs/{target}")
            else:
                print(f"docs/{target} stays as it is: `make demo` makes {DEMO / source}")
