#!/usr/bin/env bash
# Builds the documentation as a site. Every warning, such as a link to a heading that is not there, is an error.
#   bash launch/docs.sh            into ./site
#   bash launch/docs.sh DIR        into DIR
#   bash launch/docs.sh --serve    shows it at http://127.0.0.1:8000 and rebuilds it when a page changes
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
source launch/setup_env.sh

destination=$here/site
case "${1:-}" in
    --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --serve) ;;
    "") ;;
    --*) echo "docs.sh: there is no flag $1 (see --help)" >&2; exit 2 ;;
    /*) destination=$1 ;;
    *) destination=$here/$1 ;;
esac

setup_env docs
export NO_MKDOCS_2_WARNING=1  # the theme would announce its successor
if [ "${1:-}" = --serve ]; then
    exec "$PYTHON" -m mkdocs serve --strict
fi
# Not --quiet: --strict counts only the warnings that are shown.
"$PYTHON" -m mkdocs build --strict --site-dir "$destination"
echo "the site is in $destination; python -m http.server --directory $destination shows it at http://127.0.0.1:8000"
