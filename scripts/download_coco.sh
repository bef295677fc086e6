#!/usr/bin/env bash
# Download COCO 2017 into FOLDER as `data=coco2017` expects it: train2017, val2017 and their instances annotations.
#
#   scripts/download_coco.sh [--yes] [--keep-zips] FOLDER
#
# --yes        do not ask
# --keep-zips  keep the zip files; otherwise each is removed as soon as it is unpacked
#
# After an interruption run the same command again: it continues, and skips what is downloaded or unpacked. The size and MD5 sum
# of each zip are checked before it is unpacked. Needs bash, curl and unzip.
#
# COCO_BASE_URL=URL downloads from a mirror with the same paths.
set -euo pipefail

# Each line: zip on the server, its bytes and MD5 sum, about how many bytes it takes when unpacked, number of images. Sizes and
# sums are those of the originals at images.cocodataset.org, as many public projects give them. COCO_PARTS replaces the table in
# tests.
PARTS="${COCO_PARTS:-\
annotations/annotations_trainval2017.zip   252907541 f4bbac642086de4f52a3fdda2de5fa2c   490000000      0
zips/val2017.zip                           815585330 442b8da7639aecaf257c1dceb8ba8c80   840000000   5000
zips/train2017.zip                       19336861798 cced6f7f71b7629ddf16f17bbcfab6b2 19800000000 118287}"
BASE="${COCO_BASE_URL:-http://images.cocodataset.org}"
SPARE=100000000 # bytes left free

fail() {
  printf 'download_coco.sh: %s\n' "$*" >&2
  exit 1
}

usage() {
  printf 'download_coco.sh: %s\nusage: scripts/download_coco.sh [--yes] [--keep-zips] FOLDER\n' "$*" >&2
  exit 2
}

gigabytes() { # $1 bytes
  awk -v bytes="$1" 'BEGIN { printf "%.1f GB", bytes / 1e9 }'
}

bytes_of() { # $1 file; 0 if it does not exist
  if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

md5_of() { # $1 file
  if command -v md5sum >/dev/null; then md5sum "$1" | cut -d ' ' -f 1; else md5 -q "$1"; fi
}

images_in() { # $1 folder
  find "$1" -type f -name '*.jpg' | wc -l | tr -d ' '
}

is_unpacked() { # $1 name of the part
  if [ "$1" = annotations_trainval2017 ]; then
    [ -f "$folder/annotations/instances_train2017.json" ] && [ -f "$folder/annotations/instances_val2017.json" ]
  else
    [ -d "$folder/$1" ]
  fi
}

# The peak of additional disk space that the remaining parts need: a part needs its zip and its files at the same time.
bytes_needed() {
  local kept=0 peak=0 path bytes md5 unpacked images name have
  while read -r path bytes md5 unpacked images; do
    name=$(basename "$path" .zip)
    if ! is_unpacked "$name"; then
      have=$(($(bytes_of "$folder/$name.zip") + $(bytes_of "$folder/$name.zip.part")))
      if [ $((kept + bytes - have + unpacked)) -gt "$peak" ]; then peak=$((kept + bytes - have + unpacked)); fi
      kept=$((kept + unpacked - have))
      if [ -n "$keep_zips" ]; then kept=$((kept + bytes)); fi
    fi
  done <<<"$PARTS"
  if [ "$peak" -gt 0 ]; then echo $((peak + SPARE)); else echo 0; fi
}

check_space() {
  local needed free
  needed=$(bytes_needed)
  free=$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') * 1024))
  if [ "$free" -lt "$needed" ]; then
    fail "$folder: $(gigabytes "$needed") are needed while the largest zip is unpacked, $(gigabytes "$free") are free." \
      "Fix: make room, or use a folder on another disk"
  fi
}

ask() {
  cat >&2 <<END
COCO 2017, https://cocodataset.org/#termsofuse
  Annotations: by the COCO Consortium, under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
  Images: photographs of Flickr users. The Consortium does not own them; Flickr's Terms of Use apply
  (https://www.flickr.com/help/terms), and you are responsible for your use of them.
Downloading and unpacking into $folder takes up to $(gigabytes "$(bytes_needed)") of disk space.
END
  [ -z "$yes" ] || return 0
  [ -t 0 ] || fail "no terminal to ask on. Fix: --yes, if you accept these terms"
  local answer
  read -r -p "Accept these terms and continue? [y/N] " answer
  case "$answer" in y | Y | yes) ;; *) fail "not accepted; nothing was downloaded" ;; esac
}

download() { # $1 path on the server, $2 bytes, $3 MD5 sum
  local zip bytes sum
  zip="$folder/$(basename "$1")"
  if [ ! -f "$zip" ]; then
    if [ "$(bytes_of "$zip.part")" -lt "$2" ]; then
      printf '%s, %s\n' "$1" "$(gigabytes "$2")" >&2
      curl --fail --location --retry 5 --continue-at - --output "$zip.part" "$BASE/$1" ||
        fail "$BASE/$1: curl ended with code $?. Fix: run the same command again, it continues where it stopped" \
          "(code 33: the server cannot do that; remove $zip.part first)"
    fi
    bytes=$(bytes_of "$zip.part")
    if [ "$bytes" != "$2" ]; then
      fail "$zip.part has $bytes bytes, not $2. Fix: remove it, then run the same command again"
    fi
    mv "$zip.part" "$zip"
  fi
  sum=$(md5_of "$zip")
  if [ "$sum" != "$3" ]; then
    fail "$zip is damaged (MD5 sum $sum, not $3). Fix: remove it, then run the same command again"
  fi
}

unpack() { # $1 name of the part, $2 images in it
  local zip="$folder/$1.zip" count
  # A folder gets its final name once all its files are there, so it is complete if it exists.
  rm -rf "$folder/.unpacking"
  mkdir "$folder/.unpacking"
  printf 'unpacking %s\n' "$zip" >&2
  if [ "$1" = annotations_trainval2017 ]; then
    unzip -q "$zip" 'annotations/instances_*2017.json' -d "$folder/.unpacking" || fail "$zip: unzip ended with code $?"
    mkdir -p "$folder/annotations"
    mv "$folder/.unpacking/annotations"/instances_*.json "$folder/annotations/"
  else
    unzip -q "$zip" -d "$folder/.unpacking" || fail "$zip: unzip ended with code $?. Fix: make room if the disk is full"
    count=$(images_in "$folder/.unpacking/$1")
    [ "$count" = "$2" ] || fail "$zip holds $count images, not $2. Fix: remove it, then run the same command again"
    mv "$folder/.unpacking/$1" "$folder/$1"
  fi
  rm -rf "$folder/.unpacking"
}

yes='' keep_zips='' folder=''
while [ $# -gt 0 ]; do
  case "$1" in
    --yes) yes=1 ;;
    --keep-zips) keep_zips=1 ;;
    -h | --help)
      sed -n '1d; /^set/q; s/^# \{0,1\}//p' "$0"
      exit
      ;;
    -*) usage "$1: unknown option" ;;
    *)
      [ -z "$folder" ] || usage "two folders: $folder and $1"
      folder="$1"
      ;;
  esac
  shift
done
[ -n "$folder" ] || usage "FOLDER is missing"
for tool in curl unzip; do
  command -v "$tool" >/dev/null || fail "$tool is not installed. Fix: install it with your package manager"
done
mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || fail "$folder cannot be written. Fix: use another folder"
folder=$(cd "$folder" && pwd)

if [ "$(bytes_needed)" -gt 0 ]; then
  ask
  rm -rf "$folder/.unpacking" # leftovers of an interrupted run would count as used space
  check_space
fi
while read -r path bytes md5 unpacked images; do
  name=$(basename "$path" .zip)
  if ! is_unpacked "$name"; then
    download "$path" "$bytes" "$md5"
    unpack "$name" "$images"
  elif [ "$images" -gt 0 ] && [ "$(images_in "$folder/$name")" != "$images" ]; then
    fail "$folder/$name holds $(images_in "$folder/$name") images, not $images. Fix: remove it, then run the same command again"
  fi
  [ -n "$keep_zips" ] || rm -f "$folder/$name.zip"
done <<<"$PARTS"

printf '%s is complete: train2017 (the images of the paper'\''s trainval35k) and val2017 (its minival).\n' "$folder"
printf 'Row (c) of Table 1 (all six rows: -m +experiments=table1 in place of ablation=fpn):\n'
printf '  python -m fpn_ablate ablation=fpn recipe=paper2017 data=coco2017 data.root=%q\n' "$folder"
