//! Root images from tar archives, friendly and hostile.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
};

use icebox_host::guest_image::{ImageError, rootfs::Source};
use tar::{Builder, EntryType, Header};

use super::{Data, MIB, assert_clean, debugfs};

/// A member with any name: the library's own setters refuse the ones these tests are about.
fn member(kind: EntryType, name: &str, link: &str, size: u64) -> Header {
    let mut header = Header::new_gnu();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name.as_bytes());
    gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_600_000_000);
    header.set_size(size);
    header.set_cksum();
    header
}

fn archive(members: &[(Header, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (header, content) in members {
        builder.append(header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// What a small root looks like as an archive.
fn friendly() -> Vec<u8> {
    let mut home = member(EntryType::Directory, "./home/user/", "", 0);
    home.set_uid(1000);
    home.set_gid(1000);
    home.set_mode(0o750);
    home.set_cksum();
    let mut suid = member(EntryType::Regular, "usr/bin/tool", "", 4);
    suid.set_mode(0o4755);
    suid.set_cksum();
    let mut builder = Builder::new(Vec::new());
    builder
        .append(&member(EntryType::Directory, "./", "", 0), &[][..])
        .unwrap();
    builder.append(&home, &[][..]).unwrap();
    builder.append(&suid, &b"tool"[..]).unwrap();
    builder
        .append(&member(EntryType::Symlink, "bin", "usr/bin", 0), &[][..])
        .unwrap();
    builder
        .append(
            &member(EntryType::Symlink, "etc/mtab", "/proc/mounts", 0),
            &[][..],
        )
        .unwrap();
    builder
        .append(
            &member(EntryType::Link, "usr/bin/same", "usr/bin/tool", 0),
            &[][..],
        )
        .unwrap();
    builder
        .append(&member(EntryType::Char, "dev/null", "", 0), &[][..])
        .unwrap();
    builder
        .append(&member(EntryType::Fifo, "run/pipe", "", 0), &[][..])
        .unwrap();
    let note: (&str, &[u8]) = ("SCHILY.xattr.user.note", b"kept");
    builder.append_pax_extensions([note]).unwrap();
    builder
        .append(
            &member(EntryType::Regular, "etc/hostname", "", 9),
            &b"from-tar\n"[..],
        )
        .unwrap();
    builder.into_inner().unwrap()
}

fn save(data: &Data, content: &[u8]) -> PathBuf {
    let path = data.path().join("archive");
    fs::write(&path, content).unwrap();
    path
}

fn refuse(data: &Data, content: &[u8]) -> String {
    let error = data
        .build(Source::Tar(save(data, content)), Some(32 * MIB))
        .unwrap_err();
    assert!(matches!(error, ImageError::BadArchive { .. }), "{error}");
    error.to_string()
}

#[test]
fn a_file_that_is_no_archive_is_not_repeated() {
    let said = refuse(&Data::new(), &[0x9b; 4096]);
    assert!(said.ends_with("it is no tar archive"), "{said}");
}

#[test]
fn an_archive_becomes_a_root_however_it_is_compressed() {
    let data = Data::new();
    let plain = friendly();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(&plain).unwrap();
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
    xz.write_all(&plain).unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(
        plain.as_slice(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    for content in [
        plain.clone(),
        gz.finish().unwrap(),
        xz.finish().unwrap(),
        zstd,
    ] {
        let image = data
            .build(Source::Tar(save(&data, &content)), Some(32 * MIB))
            .unwrap();
        let path = image.path();
        assert_clean(path);
        assert_eq!(debugfs(path, "cat /etc/hostname"), "from-tar\n");
        assert!(debugfs(path, "ea_get /etc/hostname user.note").contains("kept"));
        let home = debugfs(path, "stat /home/user");
        assert!(
            home.contains("User:  1000   Group:  1000") && home.contains("Mode:  0750"),
            "{home}"
        );
        let tool = debugfs(path, "stat /usr/bin/tool");
        assert!(
            tool.contains("Mode:  04755") && tool.contains("Links: 2"),
            "{tool}"
        );
        assert!(debugfs(path, "stat /bin").contains("\"usr/bin\""));
        assert!(debugfs(path, "stat /etc/mtab").contains("\"/proc/mounts\""));
        // Directories that the archive only implies are like any system directory.
        assert!(debugfs(path, "stat /usr/bin").contains("Mode:  0755"));
        assert!(debugfs(path, "stat /").contains("Mode:  0755"));
        assert!(!debugfs(path, "ls /dev").contains("null"));
    }
}

#[test]
fn no_member_leaves_the_root() {
    let data = Data::new();
    let outside = data.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "mine").unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o700)).unwrap();
    let out = outside.to_str().unwrap();
    let file = |name: &str| (member(EntryType::Regular, name, "", 4), &b"evil"[..]);
    let nothing = &[][..];
    let link = |kind, name: &str, target: &str| (member(kind, name, target, 0), nothing);
    let escapes = [
        vec![file(&format!("{out}/new"))],
        vec![file("../outside/new")],
        vec![file("a/../../outside/new")],
        vec![link(EntryType::Symlink, "way", out), file("way/new")],
        vec![link(EntryType::Symlink, "way", out), file("way/deep/new")],
        vec![link(EntryType::Symlink, "up", ".."), file("up/up/new")],
        vec![
            link(EntryType::Symlink, "way", out),
            (member(EntryType::Directory, "way/", "", 0), nothing),
        ],
        vec![link(EntryType::Link, "same", &format!("{out}/file"))],
        vec![link(EntryType::Link, "same", "../outside/file")],
        vec![
            link(EntryType::Symlink, "way", out),
            link(EntryType::Link, "same", "way/file"),
        ],
        vec![(member(EntryType::Block, "disk", "", 0), nothing)],
        vec![(member(EntryType::Char, "a/dev/kmem", "", 0), nothing)],
    ];
    for members in escapes {
        let names: Vec<_> = members
            .iter()
            .map(|(header, _)| header.path().unwrap().into_owned())
            .collect();
        let error = refuse(&data, &archive(&members));
        let last = names.last().unwrap().display().to_string();
        assert!(
            error.contains(last.trim_end_matches('/')),
            "{error} should name {last}"
        );
    }
    let left: Vec<_> = fs::read_dir(&outside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["file"]);
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "mine");
    assert_eq!(
        fs::metadata(&outside).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn a_link_is_replaced_not_followed() {
    let data = Data::new();
    let outside = data.path().join("outside");
    fs::write(&outside, "mine").unwrap();
    let members = [
        (
            member(EntryType::Symlink, "file", outside.to_str().unwrap(), 0),
            &[][..],
        ),
        (member(EntryType::Regular, "file", "", 5), &b"guest"[..]),
    ];
    let image = data
        .build(Source::Tar(save(&data, &archive(&members))), Some(32 * MIB))
        .unwrap();
    assert_eq!(debugfs(image.path(), "cat /file"), "guest");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
}

#[test]
fn a_container_image_is_told_from_a_root() {
    let data = Data::new();
    let file = |name: &str| (member(EntryType::Regular, name, "", 2), &b"{}"[..]);
    let error = refuse(&data, &archive(&[file("index.json"), file("oci-layout")]));
    assert!(error.contains("docker export"), "{error}");
}

#[test]
fn what_is_no_archive_or_half_of_one_is_refused() {
    let data = Data::new();
    let good = friendly();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(&good).unwrap();
    let gz = gz.finish().unwrap();
    refuse(&data, b"");
    refuse(&data, &[0; 10_240]);
    refuse(&data, &[0x55; 10_240]);
    refuse(&data, b"PK\x03\x04 not a tar");
    refuse(&data, &good[..1300]);
    refuse(&data, &gz[..gz.len() / 2]);
    refuse(&data, b"\x28\xb5\x2f\xfd garbage garbage garbage");
    refuse(&data, b"\xfd7zXZ\0 garbage garbage garbage");
    let missing = data
        .build(Source::Tar(data.path().join("missing")), None)
        .unwrap_err();
    assert!(matches!(missing, ImageError::Io { .. }), "{missing}");
    let link = data.path().join("dir");
    symlink("/etc", &link).unwrap();
    let error = data.build(Source::Tar(link), None).unwrap_err();
    assert!(matches!(error, ImageError::BadArchive { .. }), "{error}");
}

#[test]
fn an_archive_takes_no_more_room_than_the_image_has() {
    let data = Data::new();
    // A hole of 1 TiB, as GNU tar's --sparse writes it: 512 bytes of archive.
    let mut sparse = member(EntryType::GNUSparse, "hole", "", 0);
    let gnu = sparse.as_gnu_mut().unwrap();
    gnu.set_real_size(1 << 40);
    gnu.sparse[0].set_offset(1 << 40);
    gnu.sparse[0].set_length(0);
    sparse.set_cksum();
    let error = data
        .build(
            Source::Tar(save(&data, &archive(&[(sparse, &[][..])]))),
            Some(32 * MIB),
        )
        .unwrap_err();
    assert!(
        matches!(error, ImageError::TooSmall { size_mib: 32 }),
        "{error}"
    );

    // 100 MB of zeros in 100 kB.
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let size = 100 << 20;
    gz.write_all(member(EntryType::Regular, "zeros", "", size as u64).as_bytes())
        .unwrap();
    gz.write_all(&vec![0; size]).unwrap();
    let error = data
        .build(
            Source::Tar(save(&data, &gz.finish().unwrap())),
            Some(32 * MIB),
        )
        .unwrap_err();
    assert!(
        matches!(error, ImageError::TooSmall { size_mib: 32 }),
        "{error}"
    );

    // A name of 64 MiB, which a reader has to hold in memory.
    let mut long = archive(&[(
        member(EntryType::GNULongName, "././@LongLink", "", 64 << 20),
        &[][..],
    )]);
    long.truncate(512);
    let path = save(&data, &long);
    File::options()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(&vec![b'a'; 64 << 20])
        .unwrap();
    let error = data.build(Source::Tar(path), Some(32 * MIB)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("headers of a member are too large"),
        "{error}"
    );
}
