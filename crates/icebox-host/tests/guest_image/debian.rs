//! Root images from Debian packages.

use std::{
    fs,
    sync::{Mutex, PoisonError},
};

use icebox_host::guest_image::{
    ImageError, Progress, Silent, Stage, fixture,
    rootfs::{self, Recipe, Source},
};

use super::{Data, assert_clean, debugfs, e2fs};

fn debian(suite: &str, include: &[&str]) -> Source {
    Source::Debian {
        suite: suite.to_owned(),
        include: include.iter().map(|name| (*name).to_owned()).collect(),
    }
}

#[test]
fn a_debian_image_is_what_a_sandbox_expects() {
    let image = fixture::debian_image().unwrap();
    assert_clean(&image);
    let cat = |path: &str| debugfs(&image, &format!("cat {path}"));
    assert!(cat("/etc/passwd").contains("user:x:1000:1000::/home/user:/bin/bash\n"));
    assert!(cat("/etc/sudoers.d/user").contains("NOPASSWD"));
    assert!(debugfs(&image, "stat /etc/sudoers.d/user").contains("Mode:  0440"));
    assert!(debugfs(&image, "stat /home/user").contains("User:  1000   Group:  1000"));
    assert!(debugfs(&image, "stat /usr/bin/python3").contains("Type: symlink"));
    assert!(debugfs(&image, "stat /tmp").contains("Mode:  01777"));
    assert!(debugfs(&image, "stat /").contains("Mode:  0755"));
    // Nothing of the build: not its name, resolver, downloads, or the directory its own lists were kept in.
    assert_eq!(cat("/etc/hostname"), "sandbox\n");
    assert_eq!(cat("/etc/machine-id"), "");
    assert_eq!(cat("/etc/resolv.conf"), "");
    assert!(!debugfs(&image, "ls /var/cache/apt/archives").contains(".deb"));
    assert!(!debugfs(&image, "ls /run").contains("icebox"));
    assert!(!debugfs(&image, "ls /etc/dpkg/dpkg.cfg.d").contains("mmdebstrap"));
    assert!(!debugfs(&image, "ls /etc/apt/apt.conf.d").contains("mmdebstrap"));
    assert!(cat("/etc/apt/sources.list").contains(" bookworm main"));
    let left = cat("/etc/apt/sources.list");
    assert!(!left.contains('@'), "credentials of a mirror: {left}");
}

#[test]
fn nothing_is_left_for_a_guest_to_initialise() {
    let image = fixture::debian_image().unwrap();
    let groups = e2fs("dumpe2fs", &[], &image);
    let count = |what: &str| groups.lines().filter(|line| line.contains(what)).count();
    let all = count(": (Blocks ");
    assert!(all > 1);
    assert_eq!(count("ITABLE_ZEROED"), all, "{groups}");
}

/// Remembers which stages it was told about, and that counts only grow.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Stage, u64)>>);

impl Progress for Recorder {
    fn report(&self, stage: Stage, done: u64, total: Option<u64>) {
        assert!(
            total.is_none_or(|total| done <= total),
            "{stage}: {done} of {total:?}"
        );
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.last_mut() {
            Some((last, before)) if *last == stage => {
                assert!(*before <= done, "{stage}: {done} after {before}");
                *before = done;
            }
            _ => seen.push((stage, done)),
        }
    }
}

/// One build with a cache of its own: the only test that downloads packages of a root image for itself.
#[test]
fn a_build_reports_its_stages_and_names_what_does_not_exist() {
    let data = Data::new();
    let places = icebox_host::guest_image::Places {
        cache: fixture::places().cache,
        ..data.places()
    };
    let progress = Recorder::default();
    let recipe = |source| Recipe { source, size: None };
    let image = rootfs::build(&places, &recipe(debian("bookworm", &[])), &progress).unwrap();
    assert_eq!(image.virtual_bytes, rootfs::DEFAULT_SIZE);
    assert!(
        image.allocated_bytes < image.virtual_bytes / 2,
        "{}",
        image.allocated_bytes
    );
    assert_clean(image.path());
    let seen: Vec<Stage> = progress
        .0
        .lock()
        .unwrap()
        .iter()
        .map(|(stage, _)| *stage)
        .collect();
    for stage in [
        Stage::Resolve,
        Stage::Install,
        Stage::Filesystem,
        Stage::Digest,
    ] {
        assert!(seen.contains(&stage), "{stage} was not reported: {seen:?}");
    }
    let dest = data.path().join("kept.ext4");
    let digest = image.digest.clone();
    image.persist(&dest).unwrap();
    assert_eq!(
        icebox_host::guest_image::digest_of_file(&dest, &Silent).unwrap(),
        digest
    );

    let error = rootfs::build(
        &places,
        &recipe(debian("bookworm", &["no-such-package"])),
        &progress,
    )
    .unwrap_err();
    assert!(
        matches!(&error, ImageError::UnknownPackage { package } if package == "no-such-package"),
        "{error}"
    );
    assert!(error.hint().is_some());
    let error = rootfs::build(&places, &recipe(debian("nosuchsuite", &[])), &progress).unwrap_err();
    assert!(
        matches!(&error, ImageError::UnknownSuite { suite } if suite == "nosuchsuite"),
        "{error}"
    );
    assert!(
        fs::read_dir(fixture::places().cache.join("apt"))
            .unwrap()
            .count()
            > 50,
        "downloads are kept"
    );
}
