//! Which kernel modules a guest needs, and in which order they can be loaded.
//!
//! The order comes from the modules themselves: `modpost` writes `depends=` and `softdep=` into each one's `.modinfo`
//! section, which is what `depmod` turns into `modules.dep`. Reading it here needs no kmod on the host and no
//! `modules.dep`, which Debian's packages do not carry (it is made on installation).

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use object::{Object, ObjectSection};

use super::{ImageError, Io, archive::Compression};

/// The drivers every guest needs: its bus, disk, network, random numbers, memory balloon and root filesystem.
const REQUIRED: [&str; 6] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "ext4",
];
/// Taken if the kernel has them: the bus of VMMs that have PCI, the notice that a guest was restored (in Linux since 5.18), and what the agent closes
/// stale connections with.
const OPTIONAL: [&str; 3] = ["virtio_pci", "vmgenid", "tcp_diag"];
/// The largest module that is still plausible. Bounds what a compressed one may unpack to.
const MODULE_BYTES: u64 = 64 << 20;

/// One module, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// File name without directory and compression, for example `virtio-rng.ko`.
    pub(super) file_name: String,
    pub(super) bytes: Vec<u8>,
}

/// What one module says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ModInfo {
    depends: Vec<String>,
    /// Modules that should be loaded first where they exist.
    soft_before: Vec<String>,
    /// The release in `vermagic`.
    release: String,
}

/// The modules below one `lib/modules/<release>` directory.
pub(super) struct ModuleTree {
    release: String,
    /// By normalised name (`-` is `_` in a module's name).
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// Indexes `dir` by file name; reads no module yet.
    pub(super) fn open(dir: &Path, release: &str) -> Result<Self, ImageError> {
        let mut tree = Self {
            release: release.to_owned(),
            files: BTreeMap::new(),
            builtin: BTreeSet::new(),
        };
        let builtin = dir.join("modules.builtin");
        match fs::read_to_string(&builtin) {
            Ok(text) => tree
                .builtin
                .extend(text.lines().filter_map(|line| module_name(Path::new(line)))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(ImageError::io("read", &builtin, error)),
        }
        tree.index(dir)?;
        Ok(tree)
    }

    fn index(&mut self, dir: &Path) -> Result<(), ImageError> {
        for entry in fs::read_dir(dir).at("read the directory", dir)? {
            let entry = entry.at("read the directory", dir)?;
            let path = entry.path();
            // A link here would be `build` or `source`, which lead out of the tree.
            let kind = entry.file_type().at("look at", &path)?;
            if kind.is_dir() {
                self.index(&path)?;
            } else if kind.is_file()
                && let Some(name) = module_name(&path)
            {
                self.files.insert(name, path);
            }
        }
        Ok(())
    }

    /// What [`for_guest`](Self::for_guest) looks for. A kernel that was added when it looked for something else lacks
    /// what has become necessary since.
    pub(super) fn wanted() -> Vec<String> {
        REQUIRED
            .iter()
            .chain(&OPTIONAL)
            .map(|name| (*name).to_owned())
            .collect()
    }

    /// The modules a guest needs and all they need, each after what it depends on. Built-in ones are left out.
    pub(super) fn for_guest(&self) -> Result<Vec<Module>, ImageError> {
        let optional = OPTIONAL
            .iter()
            .filter(|name| self.files.contains_key(**name));
        self.in_load_order(REQUIRED.iter().chain(optional).copied())
    }

    fn in_load_order<'a>(
        &self,
        wanted: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<Module>, ImageError> {
        let mut order = Order {
            tree: self,
            done: BTreeSet::new(),
            loading: Vec::new(),
            modules: Vec::new(),
        };
        for name in wanted {
            order.visit(name)?;
        }
        Ok(order.modules)
    }
}

/// A depth-first walk; `loading` is the path to where it stands.
struct Order<'a> {
    tree: &'a ModuleTree,
    done: BTreeSet<String>,
    loading: Vec<String>,
    modules: Vec<Module>,
}

impl Order<'_> {
    fn visit(&mut self, name: &str) -> Result<(), ImageError> {
        let name = normalise(name);
        if self.done.contains(&name) || self.tree.builtin.contains(&name) {
            return Ok(());
        }
        if self.loading.contains(&name) {
            self.loading.push(name);
            return Err(ImageError::ModuleCycle {
                chain: std::mem::take(&mut self.loading),
            });
        }
        let path = self
            .tree
            .files
            .get(&name)
            .ok_or_else(|| ImageError::ModuleMissing {
                module: name.clone(),
                release: self.tree.release.clone(),
            })?;
        let module = read_module(path)?;
        let info = ModInfo::of(path, &module.bytes)?;
        if info.release != self.tree.release {
            let reason = format!(
                "it is for kernel {}, not {}",
                info.release, self.tree.release
            );
            return Err(ImageError::BadModule {
                path: path.clone(),
                reason,
            });
        }
        self.loading.push(name.clone());
        for soft in info.soft_before.iter().map(|soft| normalise(soft)) {
            // What no file is called is an alias of something built in, or absent, which "soft" allows.
            if self.tree.files.contains_key(&soft) && !self.loading.contains(&soft) {
                self.visit(&soft)?;
            }
        }
        for hard in &info.depends {
            self.visit(hard)?;
        }
        self.loading.pop();
        self.done.insert(name);
        self.modules.push(module);
        Ok(())
    }
}

impl ModInfo {
    fn of(path: &Path, bytes: &[u8]) -> Result<Self, ImageError> {
        let bad = |reason: String| ImageError::BadModule {
            path: path.to_owned(),
            reason,
        };
        let file = object::File::parse(bytes).map_err(|error| bad(error.to_string()))?;
        let section = file
            .section_by_name(".modinfo")
            .ok_or_else(|| bad("it has no .modinfo section".to_owned()))?;
        let data = section.data().map_err(|error| bad(error.to_string()))?;
        let mut info = Self::default();
        for field in data.split(|byte| *byte == 0) {
            let field = String::from_utf8_lossy(field);
            match field.split_once('=') {
                Some(("depends", list)) => {
                    info.depends.extend(
                        list.split(',')
                            .filter(|name| !name.is_empty())
                            .map(ToOwned::to_owned),
                    );
                }
                Some(("softdep", text)) => info.soft_before.extend(soft_before(text)),
                Some(("vermagic", text)) => {
                    text.split_whitespace()
                        .next()
                        .unwrap_or_default()
                        .clone_into(&mut info.release);
                }
                _ => {}
            }
        }
        Ok(info)
    }
}

/// The `pre:` names of `softdep=pre: a b post: c`.
fn soft_before(text: &str) -> Vec<String> {
    let mut before = false;
    let mut names = Vec::new();
    for word in text.split_whitespace() {
        match word {
            "pre:" => before = true,
            "post:" => before = false,
            name if before => names.push(name.to_owned()),
            _ => {}
        }
    }
    names
}

fn normalise(name: &str) -> String {
    name.replace('-', "_")
}

/// `drivers/char/virtio-rng.ko.xz` -> `virtio-rng.ko`.
fn uncompressed_file_name(path: &Path) -> Option<&str> {
    let name = path.file_name().and_then(OsStr::to_str)?;
    let end = name.rfind(".ko")? + ".ko".len();
    matches!(&name[end..], "" | ".xz" | ".zst" | ".gz").then(|| &name[..end])
}

/// `drivers/char/virtio-rng.ko.xz` -> `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    Some(normalise(
        uncompressed_file_name(path)?.strip_suffix(".ko")?,
    ))
}

fn read_module(path: &Path) -> Result<Module, ImageError> {
    let file = fs::File::open(path).at("open", path)?;
    let bad = |reason: String| ImageError::BadModule {
        path: path.to_owned(),
        reason,
    };
    let mut bytes = Vec::new();
    Compression::reader(file)
        .and_then(|reader| reader.take(MODULE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| bad(error.to_string()))?;
    if bytes.len() as u64 > MODULE_BYTES {
        return Err(bad(format!("it is larger than {MODULE_BYTES} bytes")));
    }
    let file_name = uncompressed_file_name(path).unwrap_or_default().to_owned();
    Ok(Module { file_name, bytes })
}

#[cfg(test)]
pub(super) mod tests {
    use object::{Architecture, BinaryFormat, Endianness, SectionKind, write};

    use super::*;

    const RELEASE: &str = "6.1.0-test";

    /// A module file with nothing in it but what it says about itself.
    pub(in crate::guest_image) fn module_bytes(info: &[&str]) -> Vec<u8> {
        let mut object =
            write::Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let section =
            object.add_section(Vec::new(), b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        let mut data = info.join("\0").into_bytes();
        data.push(0);
        object.append_section_data(section, &data, 1);
        object.write().unwrap()
    }

    fn tree(modules: &[(&str, &[&str])], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        for (file, info) in modules {
            let vermagic = format!("vermagic={RELEASE} SMP preempt mod_unload ");
            let mut info = info.to_vec();
            info.push(&vermagic);
            fs::write(
                dir.path().join("kernel/drivers").join(file),
                module_bytes(&info),
            )
            .unwrap();
        }
        let tree = ModuleTree::open(dir.path(), RELEASE).unwrap();
        (dir, tree)
    }

    fn order(tree: &ModuleTree, wanted: &[&str]) -> Result<Vec<String>, ImageError> {
        Ok(tree
            .in_load_order(wanted.iter().copied())?
            .into_iter()
            .map(|module| module.file_name)
            .collect())
    }

    #[test]
    fn each_module_comes_after_what_it_needs_and_only_once() {
        let (_dir, tree) = tree(
            &[
                ("virtio.ko", &["depends=virtio_ring"]),
                ("virtio_ring.ko", &["depends="]),
                ("virtio_mmio.ko", &["depends=virtio,virtio_ring"]),
                ("virtio-rng.ko", &["depends=virtio,virtio_ring,rng-core"]),
                ("unrelated.ko", &["depends="]),
            ],
            "kernel/drivers/char/hw_random/rng-core.ko\nkernel/fs/ext4/ext4.ko\n",
        );
        assert_eq!(
            order(&tree, &["virtio_mmio", "virtio_rng", "ext4"]).unwrap(),
            [
                "virtio_ring.ko",
                "virtio.ko",
                "virtio_mmio.ko",
                "virtio-rng.ko"
            ]
        );
    }

    #[test]
    fn soft_dependencies_come_first_where_they_exist() {
        let (_dir, tree) = tree(
            &[
                (
                    "ext4.ko",
                    &["depends=jbd2", "softdep=pre: crc32c absent post: later"],
                ),
                ("jbd2.ko", &["depends="]),
                ("crc32c.ko", &["depends="]),
                ("later.ko", &["depends="]),
            ],
            "",
        );
        assert_eq!(
            order(&tree, &["ext4"]).unwrap(),
            ["crc32c.ko", "jbd2.ko", "ext4.ko"]
        );
    }

    #[test]
    fn what_cannot_be_loaded_is_named() {
        let (_dir, tree) = tree(
            &[
                ("a.ko", &["depends=b"]),
                ("b.ko", &["depends=a"]),
                ("c.ko", &["depends=d"]),
            ],
            "",
        );
        let error = order(&tree, &["a"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel modules need each other in a circle: a -> b -> a"
        );
        let error = order(&tree, &["c"]).unwrap_err();
        assert!(
            matches!(error, ImageError::ModuleMissing { ref module, .. } if module == "d"),
            "{error}"
        );
    }

    #[test]
    fn a_module_of_another_kernel_or_no_module_is_refused() {
        let (dir, _) = tree(&[("a.ko", &["depends="])], "");
        let other = ModuleTree::open(dir.path(), "6.2.0-other").unwrap();
        let error = order(&other, &["a"]).unwrap_err().to_string();
        assert!(
            error.ends_with("it is for kernel 6.1.0-test, not 6.2.0-other"),
            "{error}"
        );
        fs::write(
            dir.path().join("kernel/drivers/a.ko"),
            b"\x7fELF but not really",
        )
        .unwrap();
        assert!(matches!(
            order(&other, &["a"]),
            Err(ImageError::BadModule { .. })
        ));
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        use std::io::Write;
        let (dir, _) = tree(&[("a.ko", &["depends="])], "");
        let plain = dir.path().join("kernel/drivers/a.ko");
        let bytes = fs::read(&plain).unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&bytes).unwrap();
        fs::write(plain.with_extension("ko.gz"), gz.finish().unwrap()).unwrap();
        fs::remove_file(&plain).unwrap();
        let tree = ModuleTree::open(dir.path(), RELEASE).unwrap();
        let modules = tree.in_load_order(["a"].into_iter()).unwrap();
        assert_eq!(
            modules,
            [Module {
                file_name: "a.ko".into(),
                bytes
            }]
        );
    }
}
