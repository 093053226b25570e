#!/bin/sh
# Add a backup of the composed registry to a folder, while it serves: deploy/backup.sh FOLDER [KEEP]
# The newest KEEP dumps stay, 30 unless given. docs/operating.md says what the folder holds.
set -eu
[ $# -ge 1 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
compose=${COMPOSE:-docker compose}
mkdir -p "$1/database" && chmod 700 "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

if [ -f "$folder/secrets/secret" ] && [ "$(cat "$folder/secrets/secret")" != "$(cat secrets/secret)" ]; then
    echo "secrets/secret is not that of $folder, so they belong to two registries. Nothing was backed up and no dump" >&2
    echo "dropped. Give this registry a folder of its own." >&2
    exit 1
fi

incoming=$(mktemp "$folder/database/incoming.XXXXXX")  # its own, should another backup run
trap 'rm -f "$incoming"' EXIT
trap 'exit 1' HUP INT TERM
# By the program of the server's own version. The store's files come after it: what the dump names is there by then.
$compose exec -T postgres pg_dump --username=blueprints --format=custom --no-owner --no-privileges --no-comments \
    blueprints >"$incoming"
$compose run --rm --no-deps -T --user "$(id -u):$(id -g)" --volume "$folder:/backup" api \
    python -m app backup /backup --dump "/backup/database/${incoming##*/}" --keep "${2:-30}"
cp -Rp secrets "$folder/"
