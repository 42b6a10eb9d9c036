"""All of the paper's networks, one after the other, and the page of results.

Run:  python examples/paper/everything.py --scale small --out paper --page paper.md
"""

from __future__ import annotations

from pathlib import Path

import allcnn
import fc
import lenet
import resnet20
import vgg
from common import arguments, reproduce, settle

NETWORKS = (fc.NETWORK, lenet.NETWORK, allcnn.NETWORK, resnet20.NETWORK, vgg.NETWORK)


def main() -> None:
    """Train, analyze, and write the page; what is complete is skipped."""
    parser = arguments(__doc__)
    names = [network.name for network in NETWORKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--page", type=Path, help="where to write the page (default: not at all)")
    options = parser.parse_args()
    folder, resources = settle(options)
    for network in NETWORKS:
        if network.name in options.only:
            reproduce(network, options.scale, folder, resources)
    if options.page is not None:
        from page import make_page

        options.page.write_text(make_page(folder, options.scale, NETWORKS), encoding="utf-8")


if __name__ == "__main__":
    main()
