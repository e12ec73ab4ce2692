//! Kernels as an ELF file, for VMMs that load no other: what is compressed inside a bzImage.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use super::{ImageError, Io, archive::Compression, kernel};

/// The file's name, in the directory that it is made in.
const NAME: &str = "vmlinux";
/// Larger kernels are not believed. Debian's has 60 MB.
const BYTES_MAX: u64 = 512 << 20;
/// Offset and length of the compressed kernel, behind the setup code: Documentation/arch/x86/boot.rst, since protocol 2.08.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The kernel in `image` as an ELF file: that itself, if it is one, else the file `vmlinux` in `directory`, which is made
/// there if it is not. A directory is one kernel's alone.
///
/// Blocks: for some hundred milliseconds when it is made.
///
/// # Errors
/// The image holds no kernel that is compressed in a way that is known, or the file cannot be written.
pub fn ensure(image: &Path, directory: &Path) -> Result<PathBuf, ImageError> {
    let made = directory.join(NAME);
    if made.is_file() {
        return Ok(made);
    }
    let bytes = fs::read(image).at("read the kernel", image)?;
    if is_elf(&bytes) {
        return Ok(image.to_owned());
    }
    let kernel = unpack(&bytes).map_err(|reason| ImageError::NotAKernel {
        path: image.to_owned(),
        reason,
    })?;
    let mut file = tempfile::NamedTempFile::new_in(directory).at("make a file in", directory)?;
    file.write_all(&kernel)
        .and_then(|()| {
            // VMMs open it by path, each as a uid of its own; what keeps others away is the data directory.
            let readable = fs::Permissions::from_mode(0o444);
            file.as_file().set_permissions(readable)
        })
        .and_then(|()| file.as_file().sync_all())
        .at("write", file.path())?;
    file.persist(&made)
        .map_err(|error| error.error)
        .at("move a kernel to", &made)?;
    Ok(made)
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// The kernel inside a bzImage.
fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        Some(u64::from(u32::from_le_bytes(bytes)))
    };
    let payload = (|| {
        let start = kernel::setup_bytes(image).checked_add(number(PAYLOAD_OFFSET)?)?;
        let end = start.checked_add(number(PAYLOAD_LENGTH)?)?;
        image.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    })();
    let payload = payload.ok_or("it is cut short")?;
    // Where the stream does not end with its uncompressed length by itself, the kernel's makefiles append that.
    let stream = match payload {
        [0x1f, 0x8b, ..] => payload,
        _ => &payload[..payload.len().saturating_sub(4)],
    };
    let mut kernel = Vec::new();
    Compression::reader(stream)
        .and_then(|reader| reader.take(BYTES_MAX).read_to_end(&mut kernel))
        .map_err(|error| format!("what is compressed in it cannot be read: {error}"))?;
    if is_elf(&kernel) {
        Ok(kernel)
    } else {
        Err("what is in it is not compressed by gzip, xz, zstd or lz4: import a vmlinux".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage, as far as it is looked at.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x250 + 512 * 2];
        image[kernel::SETUP_SECTS] = 1;
        let offset = u32::try_from(image.len() - 1024).unwrap();
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&offset.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        // More than a block of LZ4.
        elf.extend((0..(9_u32 << 20) / 4).flat_map(u32::to_le_bytes));
        elf
    }

    fn lz4() -> Vec<u8> {
        let mut stream = 0x184c_2102_u32.to_le_bytes().to_vec();
        for block in elf().chunks(8 << 20) {
            let block = lz4_flex::block::compress(block);
            stream.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            stream.extend(block);
        }
        stream.extend(u32::try_from(elf().len()).unwrap().to_le_bytes());
        stream
    }

    fn gzip() -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf()).unwrap();
        gzip.finish().unwrap()
    }

    #[test]
    fn a_compressed_kernel_is_unpacked_once() {
        for payload in [lz4(), gzip()] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("vmlinuz");
            fs::write(&path, image(&payload)).unwrap();
            let made = ensure(&path, directory.path()).unwrap();
            assert_eq!(made, directory.path().join("vmlinux"));
            assert!(fs::read(&made).unwrap() == elf());
            let mode = fs::metadata(&made).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o444);
            fs::write(&path, "not looked at any more").unwrap();
            assert_eq!(ensure(&path, directory.path()).unwrap(), made);
        }
    }

    #[test]
    fn an_elf_file_is_taken_as_it_is_and_garbage_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        fs::write(&path, elf()).unwrap();
        assert_eq!(ensure(&path, directory.path()).unwrap(), path);
        let cut = |length: usize| image(&lz4())[..length].to_vec();
        for bad in [
            b"what?".to_vec(),
            cut(700),
            cut(5000),
            image(b"BZh9 is not read"),
        ] {
            fs::write(&path, bad).unwrap();
            let error = ensure(&path, directory.path()).unwrap_err();
            assert!(matches!(error, ImageError::NotAKernel { .. }), "{error}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
