//! Root images from images.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use icebox_host::guest_image::{
    ImageError, Silent, digest_of_file,
    rootfs::{MIN_SIZE, Source},
};

use super::{Data, MIB, assert_clean, debugfs, debugfs_write, dir::make_tree, e2fs};

/// A healthy image of 32 MiB in the data directory.
fn healthy(data: &Data) -> PathBuf {
    let tree = data.path().join("tree");
    make_tree(&tree);
    let path = data.path().join("source.ext4");
    data.build(Source::Dir(tree), Some(32 * MIB))
        .unwrap()
        .persist(&path)
        .unwrap();
    path
}

#[test]
fn a_healthy_image_is_copied_as_it_is_and_only_read() {
    let data = Data::new();
    let source = healthy(&data);
    let before = digest_of_file(&source, &Silent).unwrap();
    let image = data.build(Source::Image(source.clone()), None).unwrap();
    assert_eq!(image.digest, before);
    assert!(image.allocated_bytes < 8 * MIB);

    let grown = data
        .build(Source::Image(source.clone()), Some(100 * MIB))
        .unwrap();
    assert_eq!(grown.virtual_bytes, 100 * MIB);
    assert_clean(grown.path());
    assert!(e2fs("dumpe2fs", &["-h"], grown.path()).contains("Block count:              25600"));
    assert_eq!(debugfs(grown.path(), "cat /etc/hostname"), "from-dir\n");

    let error = data
        .build(Source::Image(source.clone()), Some(MIN_SIZE))
        .unwrap_err();
    assert!(matches!(error, ImageError::TooSmall { .. }), "{error}");
    assert_eq!(digest_of_file(&source, &Silent).unwrap(), before);
}

#[test]
fn an_open_journal_is_replayed_in_the_copy() {
    let data = Data::new();
    let source = healthy(&data);
    debugfs_write(&source, "feature needs_recovery");
    let before = digest_of_file(&source, &Silent).unwrap();
    let image = data.build(Source::Image(source.clone()), None).unwrap();
    assert!(!e2fs("dumpe2fs", &["-h"], image.path()).contains("needs_recovery"));
    assert_clean(image.path());
    assert_eq!(digest_of_file(&source, &Silent).unwrap(), before);
}

#[test]
fn a_damaged_image_is_refused_with_what_is_wrong() {
    let data = Data::new();
    let source = healthy(&data);
    debugfs_write(&source, "clri /etc");
    let error = data.build(Source::Image(source), None).unwrap_err();
    assert!(
        matches!(error, ImageError::DamagedFilesystem { .. }),
        "{error}"
    );
    assert!(error.to_string().lines().count() > 1, "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn what_is_no_ext4_image_is_refused_with_its_reason() {
    let data = Data::new();
    let source = healthy(&data);
    let good = fs::read(&source).unwrap();
    let candidate = data.path().join("candidate");
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut huge = good.clone();
    huge[1024 + 0x18..1024 + 0x1c].copy_from_slice(&[0xff; 4]);
    for (content, reason) in [
        (Vec::new(), "it is empty"),
        (vec![0; 100], "no ext4 superblock"),
        (vec![0x55; 1 << 20], "no ext4 superblock"),
        (b"QFI\xfb\0\0\0\x03".to_vec(), "qcow2"),
        (disk, "partition table"),
        (good[..good.len() / 2].to_vec(), "cut short"),
        (huge, "nonsense"),
    ] {
        fs::write(&candidate, content).unwrap();
        let error = data
            .build(Source::Image(candidate.clone()), None)
            .unwrap_err();
        assert!(matches!(error, ImageError::NotExt4 { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}, not {reason}");
    }
    let error = data
        .build(Source::Image(data.path().to_owned()), None)
        .unwrap_err();
    assert!(matches!(error, ImageError::NotExt4 { .. }), "{error}");

    let ext2 = data.path().join("ext2");
    File::create(&ext2).unwrap().set_len(32 * MIB).unwrap();
    e2fs("mke2fs", &["-q", "-F", "-t", "ext2"], &ext2);
    let error = data.build(Source::Image(ext2), None).unwrap_err();
    assert!(error.to_string().contains("ext2 or ext3"), "{error}");
}

#[test]
fn a_dense_image_becomes_sparse() {
    let data = Data::new();
    let source = healthy(&data);
    let dense = data.path().join("dense.ext4");
    let bytes = fs::read(&source).unwrap();
    File::create(&dense)
        .unwrap()
        .write_all_at(&bytes, 0)
        .unwrap();
    let image = data.build(Source::Image(dense), None).unwrap();
    assert!(
        image.allocated_bytes < 8 * MIB,
        "{} bytes allocated",
        image.allocated_bytes
    );
    assert_eq!(image.digest, digest_of_file(&source, &Silent).unwrap());
}
