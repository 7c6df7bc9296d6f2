#!/usr/bin/env bash
# Gradescope runs this once, when it builds its container (https://gradescope-autograders.readthedocs.io).
set -euo pipefail
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install "/autograder/source[notebooks]"
useradd --no-create-home marked && chmod 700 /autograder/source
