//! Root images from directories.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, PermissionsExt, chown, symlink},
    path::Path,
};

use icebox_host::guest_image::{
    ImageError, digest_of_file,
    rootfs::{MIN_SIZE, Source},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{Data, MIB, assert_clean, debugfs, e2fs};

/// A small tree with one of everything that must survive.
pub(super) fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("home/user")).unwrap();
    chown(root.join("home/user"), Some(1000), Some(1000)).unwrap();
    fs::write(root.join("etc/hostname"), "from-dir\n").unwrap();
    fs::write(root.join("etc/secret"), "x").unwrap();
    fs::set_permissions(root.join("etc/secret"), fs::Permissions::from_mode(0o4600)).unwrap();
    symlink("hostname", root.join("etc/link")).unwrap();
    fs::hard_link(root.join("etc/hostname"), root.join("etc/second-name")).unwrap();
    let attribute = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("etc/hostname"), "user.note", b"kept", attribute).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 * MIB).unwrap();
    sparse.write_all_at(b"end", 64 * MIB - 3).unwrap();
}

#[test]
fn owners_modes_links_attributes_and_holes_survive() {
    let data = Data::new();
    let tree = data.path().join("tree");
    make_tree(&tree);
    let image = data.build(Source::Dir(tree), Some(32 * MIB)).unwrap();
    let path = image.path();
    assert_clean(path);
    assert_eq!(image.virtual_bytes, 32 * MIB);
    assert!(
        image.allocated_bytes < 8 * MIB,
        "{} bytes allocated",
        image.allocated_bytes
    );
    assert_eq!(debugfs(path, "cat /etc/hostname"), "from-dir\n");
    assert!(debugfs(path, "stat /home/user").contains("User:  1000   Group:  1000"));
    assert!(debugfs(path, "stat /etc/secret").contains("Mode:  04600"));
    assert!(debugfs(path, "stat /etc/link").contains("Fast link dest: \"hostname\""));
    assert!(debugfs(path, "stat /etc/second-name").contains("Links: 2"));
    assert!(debugfs(path, "ea_get /etc/hostname user.note").contains("kept"));
    assert!(
        debugfs(path, "stat /sparse").contains("Blockcount: 8"),
        "{}",
        debugfs(path, "stat /sparse")
    );
    assert_eq!(
        image.digest,
        digest_of_file(path, &icebox_host::guest_image::Silent).unwrap()
    );
    let header = e2fs("dumpe2fs", &["-h"], path);
    assert!(header.contains("Reserved block count:     0"), "{header}");
}

#[test]
fn many_small_files_get_the_inodes_they_need() {
    let data = Data::new();
    let tree = data.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for n in 0..6000 {
        fs::write(tree.join(n.to_string()), "").unwrap();
    }
    let image = data.build(Source::Dir(tree), Some(48 * MIB)).unwrap();
    assert_clean(image.path());
    assert!(debugfs(image.path(), "stat /5999").contains("Type: regular"));
}

#[test]
fn content_that_does_not_fit_is_refused_in_words() {
    let data = Data::new();
    let tree = data.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("big"), vec![1; 31 << 20]).unwrap();
    for size in [MIN_SIZE, 32 * MIB, 33 * MIB] {
        let error = data
            .build(Source::Dir(tree.clone()), Some(size))
            .unwrap_err();
        assert!(
            matches!(error, ImageError::TooSmall { size_mib } if size_mib == size / MIB),
            "{error}"
        );
        assert!(error.hint().is_some());
    }
    for size in [0, 1, MIN_SIZE - 1, u64::MAX] {
        let error = data
            .build(Source::Dir(tree.clone()), Some(size))
            .unwrap_err();
        assert!(
            matches!(error, ImageError::SizeOutOfRange { .. }),
            "{error}"
        );
    }
}

#[test]
fn what_is_no_directory_is_refused() {
    let data = Data::new();
    let file = data.path().join("file");
    fs::write(&file, "x").unwrap();
    let link = data.path().join("link");
    symlink("/etc", &link).unwrap();
    for path in [file, link] {
        let error = data.build(Source::Dir(path), None).unwrap_err();
        assert!(matches!(error, ImageError::NotADirectory { .. }), "{error}");
    }
    let error = data
        .build(Source::Dir(data.path().join("missing")), None)
        .unwrap_err();
    assert!(matches!(error, ImageError::Io { .. }), "{error}");
}

/// Unmounts when dropped, also when the test fails.
struct SmallDisk<'a>(&'a Path);

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_is_called_by_its_name_and_left_as_it_was() {
    let data = Data::new();
    let tree = data.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("big"), vec![7; 12 << 20]).unwrap();
    let small = data.path().join("small");
    fs::create_dir(&small).unwrap();
    mount(
        "none",
        &small,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=8m"),
    )
    .unwrap();
    let disk = SmallDisk(&small);
    let places = icebox_host::guest_image::Places::under(&small);
    let recipe = icebox_host::guest_image::rootfs::Recipe {
        source: Source::Dir(tree),
        size: Some(64 * MIB),
    };
    let error = icebox_host::guest_image::rootfs::build(
        &places,
        &recipe,
        &icebox_host::guest_image::Silent,
    )
    .unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
    assert!(error.hint().is_some());
    assert_eq!(fs::read_dir(&places.staging).unwrap().count(), 0);
    drop(disk);
}
