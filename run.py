"""The original project's profiling command line, forwarded to `superexperts profile` and `superexperts select`.

python run.py --model_name M --dataset_name math --save_path DIR --profile_super_experts
"""

import argparse
import sys
from typing import NoReturn

from superexperts.cli import main

NAMES = ("math", "medical", "legal", "wikitext2", "c4", "tinystories", "multilingual")


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, like those of `superexperts`."""

    def error(self, message: str) -> NoReturn:
        print(f"run.py: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def forward(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, help="checkpoint folder, Hub name, or pocket")
    parser.add_argument("--dataset_name", required=True, choices=(*NAMES, "pocket"))
    parser.add_argument("--save_path", required=True, help="folder for profile.json, experts.json and the pictures")
    parser.add_argument("--profile_super_experts", action="store_true", help="profile, then write experts.json")
    options = parser.parse_args(arguments)
    if not options.profile_super_experts:
        parser.error("--profile_super_experts is missing; add it: this script only profiles")
    profile = ["profile", options.model_name, "--corpus", options.dataset_name, "--out", options.save_path]
    profile.append("--overwrite")  # as the original does
    select = ["select", options.save_path, "--rule", "super", "--out", f"{options.save_path}/experts.json"]
    return main(profile) or main(select)


if __name__ == "__main__":
    sys.exit(forward())
