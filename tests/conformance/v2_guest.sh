#!/bin/sh
# The cgroup suite on a real cgroup v2 system: a Debian kernel under qemu, without acceleration,
# with this Python and these packages in its initial file system. About 80 MB of packages, half a
# minute.
#
#     sh tests/conformance/v2_guest.sh WORK_FOLDER [pytest arguments]
#
# Needs apt-get and dpkg on a Debian-like system; installs nothing, touches only WORK_FOLDER. Ends with
# status 77 and the reason where that is not to be had. Functional tests only: Python is ten times
# slower there. `.ci/run` runs it; it is not part of `make test`, because it downloads.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
shift
python=${PYTHON:-$root/.venv/bin/python}

skip() {
    echo "SKIPPED: the cgroup suite on a real v2 kernel: $1"
    exit 77
}
if [ "$(uname -m)" != x86_64 ]; then skip "the guest is for x86-64"; fi
for program in apt-get apt-cache dpkg mkswap gzip; do
    command -v "$program" > /dev/null || skip "no $program here"
done
if [ ! -e "$work/unpacked" ]; then
    kernel=$(apt-cache depends linux-image-cloud-amd64 2> /dev/null |
        sed -n 's/.*Depends: *//p' | head -1)
    [ "$kernel" ] || skip "the package lists have no linux-image-cloud-amd64 (apt-get update?)"
    rm -rf "$work/debs" "$work/host"
    mkdir -p "$work/debs/partial" "$work/host"
    apt-get install -qq -y --no-install-recommends --download-only \
        -o Dir::Cache::archives="$work/debs" qemu-system-x86 "$kernel" busybox-static ||
        skip "packages cannot be downloaded"
    for package in "$work"/debs/*.deb; do dpkg -x "$package" "$work/host"; done
    touch "$work/unpacked"
fi
host=$work/host
guest=$work/guest
modules=$(echo "$host"/lib/modules/*)
rm -rf "$guest"
for folder in bin proc sys dev tmp run lib/modules usr/bin usr/sbin packages project; do
    mkdir -p "$guest/$folder"
done
cp "$(find "$host" -path '*bin/busybox' -type f | head -1)" "$guest/bin/busybox"
cp "$(command -v mkswap)" "$guest/usr/sbin/"
cp "$(command -v sleep)" "$guest/usr/bin/"
for module in mm/zsmalloc lib/lz4/lz4_compress lib/lz4/lz4hc_compress crypto/lz4 crypto/lz4hc \
    drivers/block/zram/zram; do
    cp "$modules/kernel/$module.ko" "$guest/lib/modules/"
done

# Python as it is here, with its standard library, and what the suite imports.
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
binary=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
packages=$("$python" -c 'import numpy, os; print(os.path.dirname(os.path.dirname(numpy.__file__)))')
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
mkdir -p "$guest$prefix/lib" "$guest$(dirname "$binary")"
cp "$binary" "$guest$binary"
tar -C "$prefix/lib" --exclude=test --exclude=site-packages --exclude=dist-packages \
    --exclude=__pycache__ --exclude='config-*' --exclude=idlelib --exclude=ensurepip \
    -cf - "$version" | tar -C "$guest$prefix/lib" -xf -
for name in numpy numpy.libs msgspec psutil pytest _pytest py.py pluggy iniconfig packaging \
    pytest_timeout.py rich pygments click; do
    [ -e "$packages/$name" ] && tar -C "$packages" --exclude=__pycache__ --exclude=tests \
        -cf - "$name" | tar -C "$guest/packages" -xf -
done
for info in "$packages"/pytest_timeout-*.dist-info; do cp -r "$info" "$guest/packages/"; done
tar -C "$root" --exclude=__pycache__ -cf - daemons testbed/__init__.py testbed/core \
    tests/conftest.py tests/conformance/test_cgroup.py pyproject.toml | tar -C "$guest/project" -xf -
for file in "$binary" "$guest/usr/bin/sleep" "$guest/usr/sbin/mkswap" \
    $(find "$guest/packages" "$guest$prefix" -name '*.so*'); do
    ldd "$file" 2>/dev/null | grep -oE '/[^ ]+' || true
done | sort -u | grep -v "^$guest" | while read -r library; do
    mkdir -p "$guest$(dirname "$library")" && cp -L "$library" "$guest$library"
done

cat > "$guest/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t cgroup2 none /sys/fs/cgroup; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
for module in zsmalloc lz4_compress lz4hc_compress lz4 lz4hc zram; do
    insmod /lib/modules/\$module.ko
done
export PATH=/usr/sbin:/usr/bin:/bin HOME=/tmp PYTHONPATH=/packages:/project
export PYTHONDONTWRITEBYTECODE=1
cd /project
$binary -m pytest --color=no ${*:-tests/conformance/test_cgroup.py} && echo SUITE PASSED
poweroff -f
END
chmod +x "$guest/init"
(cd "$guest" && find . | bin/busybox cpio -o -H newc 2>/dev/null | gzip -1 > "$work/initrd.gz")

if command -v qemu-system-x86_64 > /dev/null; then
    set -- qemu-system-x86_64
else
    set -- env LD_LIBRARY_PATH="$(find "$host" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)" \
        "$host/usr/bin/qemu-system-x86_64" -L "$host/usr/share/qemu" -L "$host/usr/share/seabios"
fi
timeout "${LIMIT_S:-400}" "$@" -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1500 \
    -nographic -no-reboot -nic none \
    -kernel "$(echo "$host"/boot/vmlinuz-*)" -initrd "$work/initrd.gz" \
    -append "console=ttyS0 panic=-1 quiet psi=1" > "$work/guest.log" 2>&1 || true
tail -n 25 "$work/guest.log" | tr -d '\r'
grep -q 'SUITE PASSED' "$work/guest.log"
