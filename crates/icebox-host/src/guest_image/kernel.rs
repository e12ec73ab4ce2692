//! Guest kernels: from the distribution's package, or the user's own.
//!
//! A kernel is a directory `kernels/<digest>/`, immutable once it is there:
//!
//! ```text
//!   manifest.json                what it is and where it came from
//!   vmlinuz                      bzImage, or an ELF with a PVH entry
//!   modules/001-virtio_ring.ko   what a guest needs, uncompressed, in load order
//!   initramfs-<agent>.cpio       made when first asked for, one per agent
//! ```
//!
//! The digest covers the image, the modules and what they were chosen for, so the same package gives the same kernel on
//! every host.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use icebox_engine::id::Digest;
use object::{
    elf,
    read::{ReadCache, elf::FileHeader},
};
use serde::{Deserialize, Serialize};

use super::{
    ImageError, Io, Places, Progress, Stage,
    apt::{Apt, Package},
    command::Tool,
    digest::{digest_of, digest_of_file},
    modules::{Module, ModuleTree},
    staging::{Published, make_private_dir, publish_dir},
};

/// Debian's kernel for virtual machines: small, and with every virtio driver.
pub const DEFAULT_PACKAGE: &str = "linux-image-cloud-amd64";

const FORMAT: u64 = 1;
const IMAGE: &str = "vmlinuz";
const MANIFEST: &str = "manifest.json";
const MODULES: &str = "modules";

/// A kernel that is complete in its place.
#[derive(Clone, Debug)]
pub struct Kernel {
    digest: Digest,
    dir: PathBuf,
    info: KernelInfo,
}

/// What the manifest says about a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    /// `uname -r`; empty for an ELF image, which does not say.
    pub release: String,
    /// How the image is packed.
    pub format: ImageFormat,
    /// Where it came from.
    pub source: KernelSource,
    /// File names below `modules/`, in load order.
    pub modules: Vec<String>,
    /// The drivers that were looked for when its modules were chosen; empty if there were no modules to choose from.
    #[serde(default)]
    pub drivers: Vec<String>,
}

/// How the image is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum ImageFormat {
    /// The Linux boot protocol's compressed image.
    BzImage,
    /// An uncompressed kernel with a PVH entry point.
    Elf,
}

/// Where a kernel came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelSource {
    /// A package of the distribution.
    Package {
        /// The package's name, for example `linux-image-6.1.0-1-cloud-amd64`.
        name: String,
        /// The package's version.
        version: String,
    },
    /// A file of the user's.
    Imported,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u64,
    writer: String,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    #[serde(flatten)]
    header: Header,
    kernel: KernelInfo,
}

impl Kernel {
    /// Its name: the digest of image and modules.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// What its manifest says.
    #[must_use]
    pub fn info(&self) -> &KernelInfo {
        &self.info
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest: written once, when the kernel is added.
    pub(super) fn manifest(&self) -> PathBuf {
        self.dir.join(MANIFEST)
    }

    /// The image to hand to the VMM.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }

    /// Whether its modules were chosen for what a guest needs today.
    pub(super) fn is_current(&self) -> bool {
        self.info.drivers == ModuleTree::wanted()
    }

    /// Its modules, in load order.
    pub fn modules(&self) -> impl Iterator<Item = PathBuf> {
        self.info
            .modules
            .iter()
            .map(|name| self.dir.join(MODULES).join(name))
    }

    /// Opens the kernel with this digest.
    ///
    /// # Errors
    /// There is none, or its manifest cannot be read or is of a newer format.
    pub fn open(places: &Places, digest: &Digest) -> Result<Self, ImageError> {
        let dir = places.kernels.join(digest.as_str());
        let path = dir.join(MANIFEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::UnknownKernel(digest.clone()));
            }
            Err(error) => return Err(ImageError::io("read", &path, error)),
        };
        let bad = |error: serde_json::Error| ImageError::BadManifest {
            path: path.clone(),
            reason: error.to_string(),
        };
        // The header alone first: a newer format may have changed everything else.
        let header: Header = serde_json::from_str(&text).map_err(bad)?;
        if header.format > FORMAT {
            return Err(ImageError::NewerManifest {
                path,
                found: header.format,
                known: FORMAT,
            });
        }
        let Manifest { kernel: info, .. } = serde_json::from_str(&text).map_err(bad)?;
        Ok(Self {
            digest: digest.clone(),
            dir,
            info,
        })
    }
}

/// Every kernel that is here, by digest. What is not called like a digest is skipped.
///
/// # Errors
/// The directory or one of the manifests cannot be read.
pub fn list(places: &Places) -> Result<Vec<Kernel>, ImageError> {
    let dir = &places.kernels;
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ImageError::io("read the directory", dir, error)),
    };
    let mut kernels = Vec::new();
    for entry in entries {
        let name = entry.at("read the directory", dir)?.file_name();
        if let Some(digest) = name.to_str().and_then(|name| name.parse().ok()) {
            kernels.push(Kernel::open(places, &digest)?);
        }
    }
    kernels.sort_by(|a, b| a.digest.cmp(&b.digest));
    Ok(kernels)
}

/// Takes the kernel out of a package of the host's distribution, without installing it. `package` is a kernel package
/// or a metapackage for one ([`DEFAULT_PACKAGE`]). A kernel of that version that is already here is returned as it is,
/// without any download.
///
/// Blocks for seconds: a download of some 30 MB.
///
/// # Errors
/// The host's package sources do not have it or cannot be reached; its content is not what a guest needs.
pub fn fetch(
    places: &Places,
    package: &str,
    progress: &dyn Progress,
) -> Result<Kernel, ImageError> {
    let mut apt = Apt::new(&places.cache);
    apt.with_lists(progress, |apt| {
        let packages = resolve(apt, package, progress)?;
        let source = KernelSource::Package {
            name: packages[0].name.clone(),
            version: packages[0].version.clone(),
        };
        if let Some(here) = list(places)?
            .into_iter()
            .find(|kernel| kernel.info.source == source && kernel.is_current())
        {
            return Ok(here);
        }
        let work = places.stage("kernel-package")?;
        let tree = work.path().join("tree");
        for package in &packages {
            let deb = apt.download(package, work.path(), progress)?;
            progress.report(Stage::Unpack, 0, None);
            Tool::new("dpkg-deb")
                .arg("--extract")
                .arg(&deb)
                .arg(&tree)
                .run()?
                .success()?;
        }
        let (image, modules) = find_kernel(&tree)?;
        add(places, &image, Some(&modules), source)
    })
}

/// Imports a kernel of the user's own. `image` is an x86-64 bzImage, or a vmlinux with a PVH entry point (`CONFIG_PVH`).
/// `modules` is its `lib/modules/<release>` directory; without one, all that a guest needs must be built in, which
/// shows only when it boots.
///
/// # Errors
/// The image is not one of these or is cut short; a module is missing or for another kernel.
pub fn import(places: &Places, image: &Path, modules: Option<&Path>) -> Result<Kernel, ImageError> {
    add(places, image, modules, KernelSource::Imported)
}

/// The package that has the image, and those its modules are in where the distribution splits them off.
fn resolve(apt: &Apt, package: &str, progress: &dyn Progress) -> Result<Vec<Package>, ImageError> {
    let mut image = apt.resolve(package, None, progress)?;
    if let Some((name, version)) = image
        .exact_dependencies()
        .into_iter()
        .find(|(name, _)| name.starts_with("linux-image-"))
    {
        image = apt.resolve(&name, Some(&version), progress)?;
    }
    let mut packages = vec![image];
    for (name, version) in packages[0].exact_dependencies() {
        if name.starts_with("linux-modules-") || name.starts_with("linux-binary-") {
            packages.push(apt.resolve(&name, Some(&version), progress)?);
        }
    }
    Ok(packages)
}

/// The image and the module directory in an unpacked package.
fn find_kernel(tree: &Path) -> Result<(PathBuf, PathBuf), ImageError> {
    let missing = |what: &str| ImageError::NotAKernel {
        path: tree.to_owned(),
        reason: format!("the package has no {what}"),
    };
    let only = |dir: PathBuf, prefix: &str| -> Option<PathBuf> {
        let mut found: Vec<PathBuf> = fs::read_dir(dir)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
            })
            .collect();
        found.sort();
        found.pop()
    };
    let modules = ["lib/modules", "usr/lib/modules"]
        .into_iter()
        .find_map(|dir| only(tree.join(dir), ""))
        .ok_or_else(|| missing("lib/modules/<release>"))?;
    let image = only(tree.join("boot"), "vmlinuz-")
        .or_else(|| only(modules.clone(), IMAGE))
        .ok_or_else(|| missing("boot/vmlinuz-<release>"))?;
    Ok((image, modules))
}

fn add(
    places: &Places,
    image: &Path,
    modules: Option<&Path>,
    source: KernelSource,
) -> Result<Kernel, ImageError> {
    let (format, release) = inspect(image)?;
    let (modules, drivers) = match modules {
        Some(dir) => {
            // An ELF does not tell its release; the directory of its modules is called by it.
            let of_dir = dir
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            let release = if release.is_empty() {
                &of_dir
            } else {
                &release
            };
            let modules = ModuleTree::open(dir, release)?.for_guest()?;
            (modules, ModuleTree::wanted())
        }
        None => (Vec::new(), Vec::new()),
    };
    make_private_dir(&places.kernels)?;
    let staged = places.stage("kernel")?;
    let image_copy = staged.path().join(IMAGE);
    // Readable by everybody, as an initramfs is: some distributions' kernels are not.
    fs::copy(image, &image_copy)
        .and_then(|_| fs::set_permissions(&image_copy, PermissionsExt::from_mode(0o444)))
        .at("copy the kernel image to", &image_copy)?;
    let mut identity = format!("{IMAGE} {}\n", digest_of_file(&image_copy, &super::Silent)?);
    // The same modules chosen for other needs are another kernel: its manifest says so.
    identity += &format!("for {}\n", drivers.join(","));
    let module_dir = staged.path().join(MODULES);
    make_private_dir(&module_dir)?;
    let mut names = Vec::new();
    for (at, Module { file_name, bytes }) in (1..).zip(modules) {
        let name = format!("{at:03}-{file_name}");
        identity += &format!("{name} {}\n", digest_of(&bytes));
        let path = module_dir.join(&name);
        fs::write(&path, bytes).at("write", &path)?;
        names.push(name);
    }
    let info = KernelInfo {
        release,
        format,
        source,
        modules: names,
        drivers,
    };
    let header = Header {
        format: FORMAT,
        writer: concat!("icebox ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    let path = staged.path().join(MANIFEST);
    let text = serde_json::to_string_pretty(&Manifest {
        header,
        kernel: info.clone(),
    })
    .map_err(|error| ImageError::io("write", &path, error.into()))?;
    fs::write(&path, text).at("write", &path)?;

    let digest = digest_of(identity.as_bytes());
    let dir = places.kernels.join(digest.as_str());
    match publish_dir(staged, &dir)? {
        Published::Created => Ok(Kernel { digest, dir, info }),
        // The same bytes may have come another way; what was there first stays what it says it is.
        Published::AlreadyPresent => Kernel::open(places, &digest),
    }
}

/// Checks that `path` is a kernel a VMM can start, and reads its release where it tells.
fn inspect(path: &Path) -> Result<(ImageFormat, String), ImageError> {
    let mut file = File::open(path).at("open", path)?;
    let metadata = file.metadata().at("look at", path)?;
    let bad = |reason: &str| ImageError::NotAKernel {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if !metadata.is_file() {
        return Err(bad("it is not a regular file"));
    }
    let mut start = Vec::new();
    file.by_ref()
        .take(64 << 10)
        .read_to_end(&mut start)
        .at("read", path)?;
    if start.starts_with(b"\x7fELF") {
        check_elf(file).map_err(|reason| bad(&reason))?;
        Ok((ImageFormat::Elf, String::new()))
    } else {
        let release = check_bzimage(&start, metadata.len()).map_err(bad)?;
        Ok((ImageFormat::BzImage, release))
    }
}

/// Where the numbers of the setup header are, and what they mean: Documentation/arch/x86/boot.rst in the kernel's sources.
pub(super) const SETUP_SECTS: usize = 0x1f1;

/// Bytes before what a bzImage runs in protected mode, from its start.
pub(super) fn setup_bytes(start: &[u8]) -> u64 {
    let sectors = match start.get(SETUP_SECTS) {
        None | Some(0) => 4,
        Some(sectors) => u64::from(*sectors),
    };
    (sectors + 1) * 512
}

/// The header is that of the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst in the kernel's sources).
fn check_bzimage(start: &[u8], length: u64) -> Result<String, &'static str> {
    const SYSSIZE: usize = 0x1f4;
    const BOOT_FLAG: usize = 0x1fe;
    const HEADER: usize = 0x202;
    const VERSION: usize = 0x206;
    const KERNEL_VERSION: usize = 0x20e;
    let u16_at = |at: usize| {
        start
            .get(at..at + 2)
            .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    if u16_at(BOOT_FLAG) != Some(0xaa55) || start.get(HEADER..HEADER + 4) != Some(b"HdrS") {
        return Err("it is neither a bzImage nor an ELF file");
    }
    if u16_at(VERSION).is_none_or(|version| version < 0x0206) {
        return Err("its boot protocol is older than 2.06");
    }
    let payload = start.get(SYSSIZE..SYSSIZE + 4).map_or(0, |b| {
        u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    });
    if length < setup_bytes(start) + payload * 16 {
        return Err("it is cut short");
    }
    let text = u16_at(KERNEL_VERSION)
        .filter(|at| *at != 0)
        .and_then(|at| start.get(at + 0x200..))
        .unwrap_or_default();
    let text = text
        .split(|byte| *byte == 0 || *byte == b' ')
        .next()
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// A VMM starts an ELF kernel at the entry point its `XEN_ELFNOTE_PHYS32_ENTRY` note gives.
fn check_elf(mut file: File) -> Result<(), String> {
    const XEN_ELFNOTE_PHYS32_ENTRY: elf::NoteType = elf::NoteType(18);
    let text = |error: object::Error| error.to_string();
    file.seek(SeekFrom::Start(0))
        .map_err(|error| error.to_string())?;
    let data = &ReadCache::new(file);
    let header = elf::FileHeader64::<object::Endianness>::parse(data).map_err(text)?;
    let endian = header.endian().map_err(text)?;
    if header.e_machine(endian) != elf::EM_X86_64 {
        return Err("it is not for x86-64".to_owned());
    }
    for segment in header.program_headers(endian, data).map_err(text)? {
        use object::read::elf::ProgramHeader;
        if let Some(mut notes) = segment.notes(endian, data).map_err(text)? {
            while let Some(note) = notes.next().map_err(text)? {
                if note.name() == b"Xen" && note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY {
                    return Ok(());
                }
            }
        }
    }
    Err("it has no PVH entry point".to_owned())
}
