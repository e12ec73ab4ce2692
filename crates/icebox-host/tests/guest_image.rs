//! Kernels, initramfs and root images, made for real: needs root, the distribution's tools and its package mirror.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is how a test fails, in its helpers too"
)]

use std::{path::Path, process::Command};

use icebox_host::guest_image::{
    fixture,
    kernel::{ImageFormat, KernelSource},
};

/// What `debugfs` says about a file in an image.
fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("/usr/sbin/debugfs")
        .args(["-R", request])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn assert_clean(image: &Path) {
    let output = Command::new("/usr/sbin/e2fsck")
        .args(["-fn"])
        .arg(image)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn debians_kernel_boots_a_guest_from_virtio_devices() {
    let kernel = fixture::kernel().unwrap();
    assert_eq!(kernel.info().format, ImageFormat::BzImage);
    assert!(matches!(kernel.info().source, KernelSource::Package { .. }));
    assert!(
        kernel.info().release.ends_with("cloud-amd64"),
        "{}",
        kernel.info().release
    );
    let names: Vec<&str> = kernel
        .info()
        .modules
        .iter()
        .map(|name| &name[4..])
        .collect();
    let place = |name: &str| {
        names
            .iter()
            .position(|have| *have == name)
            .unwrap_or_else(|| panic!("no {name}"))
    };
    assert!(place("virtio_ring.ko") < place("virtio.ko"), "{names:?}");
    for driver in [
        "virtio_mmio.ko",
        "virtio_blk.ko",
        "virtio_net.ko",
        "virtio-rng.ko",
        "virtio_balloon.ko",
    ] {
        assert!(place("virtio.ko") < place(driver), "{names:?}");
    }
    assert!(
        place("net_failover.ko") < place("virtio_net.ko"),
        "{names:?}"
    );
    assert!(kernel.modules().all(|path| path.is_file()));
}

#[test]
fn a_debian_image_is_what_a_sandbox_expects() {
    let image = fixture::debian_image().unwrap();
    assert_clean(&image);
    let cat = |path: &str| debugfs(&image, &format!("cat {path}"));
    assert!(cat("/etc/passwd").contains("user:x:1000:1000::/home/user:/bin/bash\n"));
    assert!(cat("/etc/sudoers.d/user").contains("NOPASSWD"));
    assert_eq!(cat("/etc/hostname"), "sandbox\n");
    assert_eq!(cat("/etc/machine-id"), "");
    assert_eq!(cat("/etc/resolv.conf"), "");
    assert!(debugfs(&image, "stat /home/user").contains("User:  1000   Group:  1000"));
    assert!(debugfs(&image, "stat /usr/bin/python3").contains("Type: symlink"));
    assert!(!debugfs(&image, "ls /var/cache/apt/archives").contains(".deb"));
    assert!(!debugfs(&image, "ls /run").contains("icebox"));
    let sources = cat("/etc/apt/sources.list") + &debugfs(&image, "ls /etc/apt/sources.list.d");
    assert!(sources.contains("bookworm"), "{sources}");
}
