//! Root images and kernels on this machine, made by worker processes.

use async_trait::async_trait;
use icebox_api::types::{
    BuildEvent, BuildSource, Check, Kernel, KernelEvent, KernelSource, Report,
};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::host::{Host, HostError};
use icebox_engine::id::Digest;
use icebox_engine::layout::{Layout, Object};
use icebox_engine::unit::Bytes;
use icebox_host::guest_image::{Places, kernel};
use tokio::sync::mpsc;

use super::{job, try_volume};
use crate::serve::config::Config;
use crate::serve::workshop::{RootImage, Workshop};
use crate::serve::{doctor, host_error};
use crate::worker::Work;

/// Where this machine's workshop works.
pub(super) struct RealWorkshop {
    pub(super) host: Host,
    pub(super) places: Places,
    pub(super) layout: Layout,
    pub(super) config: Config,
    /// What was left out when the daemon started, and why.
    pub(super) findings: Vec<Check>,
}

impl RealWorkshop {
    async fn describe(&self, kernel: &kernel::Kernel, default: Option<&Digest>) -> Kernel {
        let digest = kernel.digest();
        let object = Object::Kernel(digest.clone());
        let allocated = self.host.store.allocated(&object).await.unwrap_or_default();
        let origin = match &kernel.info().source {
            kernel::KernelSource::Package { name, version } => format!("package {name} {version}"),
            kernel::KernelSource::Imported => "imported from a file".to_owned(),
        };
        Kernel {
            digest: digest.to_string(),
            version: kernel.info().release.clone(),
            origin,
            allocated_bytes: allocated.0,
            default: default == Some(digest),
        }
    }

    async fn fetch<E>(
        &self,
        source: KernelSource,
        events: &mpsc::Sender<E>,
        event: fn(job::Step) -> E,
    ) -> Result<Kernel, ApiError> {
        let digest = job::run(&self.places, Work::Kernel(source), events, event).await?;
        let digest: Digest = digest
            .and_then(|digest| digest.parse().ok())
            .ok_or_else(|| ApiError::new(ErrorCode::Internal, "the worker named no kernel"))?;
        let opened = kernel::Kernel::open(&self.places, &digest)
            .map_err(|error| host_error(&HostError::from(error)))?;
        let default = self.host.kernels.default_kernel().await.ok();
        Ok(self.describe(&opened, default.as_ref()).await)
    }
}

#[async_trait]
impl Workshop for RealWorkshop {
    async fn kernel(&self, events: &mpsc::Sender<BuildEvent>) -> Result<Digest, ApiError> {
        if kernel::list(&self.places).is_ok_and(|kernels| kernels.is_empty()) {
            let event = |step: job::Step| step.into_build_event("kernel: ");
            self.fetch(KernelSource::Debian, events, event).await?;
        }
        let default = self.host.kernels.default_kernel().await;
        default.map_err(|error| host_error(&error))
    }

    async fn image(
        &self,
        source: BuildSource,
        size: Option<Bytes>,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<RootImage, ApiError> {
        let directory = job::directory(&self.places)?;
        let out = directory.path().join("image");
        let work = Work::Image {
            source,
            size: size.map(|size| size.0),
            out: out.clone(),
        };
        let event = |step: job::Step| step.into_build_event("");
        job::run_in(&self.places, directory.path(), work, events, event).await?;
        Ok(RootImage::new(directory, out))
    }

    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        let found =
            kernel::list(&self.places).map_err(|error| host_error(&HostError::from(error)))?;
        let default = self.host.kernels.default_kernel().await.ok();
        let mut kernels = Vec::new();
        for kernel in &found {
            kernels.push(self.describe(kernel, default.as_ref()).await);
        }
        Ok(kernels)
    }

    async fn import_kernel(
        &self,
        source: KernelSource,
        events: &mpsc::Sender<KernelEvent>,
    ) -> Result<Kernel, ApiError> {
        self.fetch(source, events, job::Step::into_kernel_event)
            .await
    }

    async fn doctor(&self) -> Report {
        let named = self.config.volume_driver.as_deref();
        let mut tried = Vec::new();
        for driver in &self.host.volumes {
            let works = try_volume(driver.as_ref(), &self.config, &self.layout).await;
            tried.push((driver.name(), works));
        }
        let mut checks = doctor::host(&self.host, tried, named).await;
        checks.extend(self.findings.iter().cloned());
        Report { checks }
    }
}
