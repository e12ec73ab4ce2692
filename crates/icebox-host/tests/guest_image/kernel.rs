//! Kernels.

use std::{fs, path::Path};

use icebox_engine::host::{ErrorKind, Kernels};
use icebox_host::guest_image::{
    ImageError, KernelStore, Silent, fixture,
    kernel::{self, DEFAULT_PACKAGE, ImageFormat, Kernel, KernelSource},
};

use super::Data;

#[test]
fn debians_kernel_comes_with_its_drivers_in_load_order() {
    let kernel = fixture::kernel().unwrap();
    assert_eq!(kernel.info().format, ImageFormat::BzImage);
    assert!(
        kernel.info().release.ends_with("cloud-amd64"),
        "{}",
        kernel.info().release
    );
    assert!(kernel.modules().all(|path| path.is_file()));
    let names: Vec<&str> = kernel
        .info()
        .modules
        .iter()
        .map(|name| &name[4..])
        .collect();
    let place = |name: &str| names.iter().position(|have| *have == name);
    for driver in [
        "virtio_mmio.ko",
        "virtio_blk.ko",
        "virtio_net.ko",
        "virtio-rng.ko",
        "virtio_balloon.ko",
    ] {
        let driver = place(driver).unwrap_or_else(|| panic!("no {driver} in {names:?}"));
        // Some releases have the bus itself built in: then there is no module, which sorts before all others.
        assert!(place("virtio.ko") < Some(driver), "{names:?}");
    }
    assert!(place("virtio_ring.ko") <= place("virtio.ko"), "{names:?}");
    assert!(
        place("net_failover.ko") < place("virtio_net.ko"),
        "{names:?}"
    );
}

#[test]
fn a_kernel_that_is_here_is_not_fetched_again() {
    let data = Data::new();
    let written = |kernel: &Kernel| fs::metadata(kernel.image()).unwrap().modified().unwrap();
    let first = kernel::fetch(&data.places(), DEFAULT_PACKAGE, &Silent).unwrap();
    assert!(
        matches!(&first.info().source, KernelSource::Package { name, .. } if name != DEFAULT_PACKAGE)
    );
    let again = kernel::fetch(&data.places(), DEFAULT_PACKAGE, &Silent).unwrap();
    assert_eq!(again.digest(), first.digest());
    assert_eq!(written(&again), written(&first));
    assert_eq!(kernel::list(&data.places()).unwrap().len(), 1);

    // One whose drivers were chosen for an older need is not what a guest needs now.
    let manifest = first.dir().join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"vmgenid\"", "\"virtio_of_old\"")).unwrap();
    fs::rename(first.dir(), data.places().kernels.join("0".repeat(64))).unwrap();
    let renewed = kernel::fetch(&data.places(), DEFAULT_PACKAGE, &Silent).unwrap();
    assert_eq!(renewed.digest(), first.digest());
    assert_eq!(kernel::list(&data.places()).unwrap().len(), 2);
}

#[test]
fn a_package_that_does_not_exist_is_named() {
    let data = Data::new();
    let error = kernel::fetch(&data.places(), "linux-image-of-nobody", &Silent).unwrap_err();
    assert!(
        matches!(&error, ImageError::UnknownPackage { package } if package == "linux-image-of-nobody"),
        "{error}"
    );
    let error = kernel::fetch(&data.places(), "--yes", &Silent).unwrap_err();
    assert!(
        matches!(error, ImageError::InvalidPackage { .. }),
        "{error}"
    );
}

#[test]
fn an_own_kernel_is_imported_once() {
    let data = Data::new();
    let image = fixture::kernel().unwrap().image();
    let kernel = kernel::import(&data.places(), &image, None).unwrap();
    assert_eq!(kernel.info().source, KernelSource::Imported);
    assert_eq!(fs::read(kernel.image()).unwrap(), fs::read(&image).unwrap());
    let again = kernel::import(&data.places(), &image, None).unwrap();
    assert_eq!(again.digest(), kernel.digest());
    let listed = kernel::list(&data.places()).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        Kernel::open(&data.places(), kernel.digest())
            .unwrap()
            .info(),
        kernel.info()
    );
}

#[test]
fn what_is_no_kernel_is_refused_with_its_reason() {
    let data = Data::new();
    let good = fs::read(fixture::kernel().unwrap().image()).unwrap();
    let path = data.path().join("candidate");
    let mut old = good.clone();
    old[0x206..0x208].copy_from_slice(&[0, 2]);
    for (content, reason) in [
        (Vec::new(), "neither a bzImage nor an ELF"),
        (vec![0; 100_000], "neither a bzImage nor an ELF"),
        (good[..good.len() / 2].to_vec(), "cut short"),
        (good[..0x210].to_vec(), "cut short"),
        (old, "older than 2.06"),
        (fs::read("/bin/true").unwrap(), "no PVH entry point"),
        (b"\x7fELF".to_vec(), "is not a Linux kernel image"),
    ] {
        fs::write(&path, content).unwrap();
        let error = kernel::import(&data.places(), &path, None).unwrap_err();
        assert!(matches!(error, ImageError::NotAKernel { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}, not {reason}");
        assert!(error.hint().is_some());
    }
    assert!(matches!(
        kernel::import(&data.places(), data.path(), None),
        Err(ImageError::NotAKernel { .. })
    ));
    assert!(matches!(
        kernel::import(&data.places(), Path::new("/nonexistent"), None),
        Err(ImageError::Io { .. })
    ));
    assert!(kernel::list(&data.places()).unwrap().is_empty());
}

#[test]
fn modules_must_be_there_and_the_kernels_own() {
    let data = Data::new();
    let image = fixture::kernel().unwrap().image();
    let modules = data.path().join("modules");
    fs::create_dir(&modules).unwrap();
    let error = kernel::import(&data.places(), &image, Some(&modules)).unwrap_err();
    assert!(
        matches!(&error, ImageError::ModuleMissing { module, .. } if module == "virtio_mmio"),
        "{error}"
    );
    fs::write(
        modules.join("modules.builtin"),
        "kernel/virtio_mmio.ko\nvirtio_blk.ko\nvirtio_net.ko\nvirtio-rng.ko\nvirtio_balloon.ko\nkernel/fs/ext4/ext4.ko\n",
    )
    .unwrap();
    let kernel = kernel::import(&data.places(), &image, Some(&modules)).unwrap();
    assert!(kernel.info().modules.is_empty());
}

#[test]
fn inv_44_a_newer_manifest_is_refused_naming_both_formats() {
    let data = Data::new();
    let kernel = kernel::import(&data.places(), &fixture::kernel().unwrap().image(), None).unwrap();
    let path = kernel.dir().join("manifest.json");
    fs::write(
        &path,
        r#"{"format": 99, "writer": "icebox 9.0.0", "something": "else"}"#,
    )
    .unwrap();
    let error = Kernel::open(&data.places(), kernel.digest()).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("has format 99, and this version reads formats up to 1"),
        "{error}"
    );
    fs::write(&path, "{").unwrap();
    assert!(matches!(
        kernel::list(&data.places()),
        Err(ImageError::BadManifest { .. })
    ));
}

#[tokio::test]
async fn the_engine_gets_the_newest_kernel_and_its_boot_files() {
    let data = Data::new();
    let agent = data.path().join("agent");
    fs::write(&agent, "an agent").unwrap();
    let store = KernelStore::new(data.places(), agent.clone(), None);
    let error = store.default_kernel().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.hint_text().is_some());

    let image = fixture::kernel().unwrap().image();
    let kernel = kernel::import(&data.places(), &image, None).unwrap();
    assert_eq!(&store.default_kernel().await.unwrap(), kernel.digest());
    let files = store.boot_files(kernel.digest()).await.unwrap();
    assert_eq!(files.kernel, kernel.image());
    let first = fs::read(&files.initramfs).unwrap();
    assert_eq!(store.boot_files(kernel.digest()).await.unwrap(), files);

    fs::remove_file(&files.initramfs).unwrap();
    assert_eq!(store.boot_files(kernel.digest()).await.unwrap(), files);
    assert_eq!(fs::read(&files.initramfs).unwrap(), first, "made again");

    fs::write(&agent, "another agent").unwrap();
    let other = store.boot_files(kernel.digest()).await.unwrap();
    assert_ne!(other.agent, files.agent);
    assert_ne!(other.initramfs, files.initramfs);
    assert_eq!(
        fs::read(&files.initramfs).unwrap(),
        first,
        "an initramfs in use never changes"
    );

    let configured = KernelStore::new(data.places(), agent, Some("0".repeat(64).parse().unwrap()));
    assert_eq!(
        configured.default_kernel().await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}
