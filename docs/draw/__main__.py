"""python -m docs.draw: draw all pictures, or those that are named."""

import sys

from docs.draw import FIGURES, data_of, names, write

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or names():
        write(name, data_of(name), FIGURES / f"{name}.svg")
        print(f"docs/figures/{name}.svg")
