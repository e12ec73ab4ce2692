//! Templates: importing, flattening, removing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{Engine, ask, check_geometry};
use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::id::{Digest, Name, TemplateId};
use crate::layout::{BASE_IMAGE, Object};
use crate::manifest;
use crate::manifest::v1::{self, Base, Template, TemplateContent};
use crate::panics::caught;
use crate::sandbox::{Frozen, Request, find_volume_driver};
use crate::steps::Steps;
use crate::unit::{Bytes, Geometry};

/// A new image template.
#[derive(Clone, Debug)]
pub struct ImageRequest {
    /// The template's name.
    pub name: Name,
    /// CPUs and memory of sandboxes that do not ask for others.
    pub geometry: Geometry,
    /// The kernel to boot.
    pub kernel: Digest,
    /// Variables for every command.
    pub env: BTreeMap<String, String>,
    /// Where it came from, in words.
    pub source: String,
}

impl Engine {
    /// Imports a raw disk image, which is moved from `image` (on the data directory's file system), as a template.
    ///
    /// # Errors
    /// `image` may be left where it was; nothing else is.
    pub async fn import_image(
        &self,
        image: &Path,
        request: ImageRequest,
    ) -> Result<Template, Error> {
        self.require_room().await?;
        let image = image.to_owned();
        self.detached("importing an image", |engine| async move {
            engine.publish_image(&image, request).await
        })
        .await
    }

    async fn publish_image(&self, image: &Path, request: ImageRequest) -> Result<Template, Error> {
        let _reserved = self.shared.catalog.reserve_template_name(&request.name)?;
        check_geometry(request.geometry, u8::MAX, self.shared.config.max_mem_mib)?;
        let store = Arc::clone(&self.shared.host.store);
        let digest = within(deadline::SAVE, "hashing the image", store.digest(image)).await?;
        let size = within(
            deadline::STORE,
            "measuring the image",
            store.file_size(image),
        )
        .await?;
        if size.0 == 0 || !size.0.is_multiple_of(512) {
            return Err(Error::Invalid {
                message: format!("an image of {} bytes is not a disk", size.0),
                hint: "a disk is a whole number of sectors of 512 bytes".into(),
            });
        }
        // From before it is looked for until a template refers to it.
        let pin = self.shared.catalog.pin([Object::Base(digest.clone())]);
        self.publish_base(image, &digest, size).await?;
        let template = Template {
            id: TemplateId::random(),
            name: request.name,
            content: TemplateContent::Image { base: digest },
            geometry: request.geometry,
            disk_size: size,
            kernel: request.kernel,
            env: request.env,
            source: request.source,
            created_at: self.shared.now(),
        };
        let object = Object::Template(template.id.clone());
        let published = within(deadline::STORE, "publishing the template", async {
            store.stage(&object).await?;
            store
                .publish(&object, &manifest::encode(1, &template))
                .await
        });
        if let Err(error) = caught("publishing a template", published).await {
            self.discard(&object).await;
            return Err(error);
        }
        self.shared.catalog.add_template(template.clone());
        drop(pin);
        let detail = format!("{} from {}", template.name, template.source);
        self.shared
            .events
            .emit(None, "template.created", detail, &Steps::default());
        Ok(template)
    }

    async fn publish_base(&self, image: &Path, digest: &Digest, size: Bytes) -> Result<(), Error> {
        let object = Object::Base(digest.clone());
        // The same content may be published or collected by somebody else at this moment.
        let _collecting = self.shared.collecting.lock().await;
        if self.shared.catalog.has_base(digest) {
            return Ok(());
        }
        // A collection has failed to remove it, or does not know that it has.
        if self.shared.catalog.is_condemned(&object) {
            collect::remove(&self.shared, &object).await?;
        }
        let store = &self.shared.host.store;
        let base = Base {
            digest: digest.clone(),
            size,
            created_at: self.shared.now(),
        };
        let published = within(deadline::STORE, "publishing the image", async {
            store.stage(&object).await?;
            store.move_into_staging(image, &object, BASE_IMAGE).await?;
            store.publish(&object, &manifest::encode(1, &base)).await
        });
        if let Err(error) = caught("publishing an image", published).await {
            self.discard(&object).await;
            return Err(error);
        }
        self.shared.catalog.add_base(base);
        Ok(())
    }

    async fn discard(&self, object: &Object) {
        let store = &self.shared.host.store;
        let discarded = async {
            store.discard(object).await?;
            store.trash(object).await
        };
        if let Err(error) =
            within(deadline::STORE, "discarding what is not needed", discarded).await
        {
            tracing::warn!(%object, %error, "left for the next start to remove");
        }
    }

    /// Makes an image template of a sandbox's disk as it is now. The sandbox stands still for the freeze alone.
    pub async fn flatten(&self, wanted: &str, name: Name) -> Result<Template, Error> {
        let entry = self.with_room(wanted).await?;
        drop(self.shared.catalog.reserve_template_name(&name)?);
        self.detached("flattening", |engine| async move {
            let frozen = ask(&entry, Request::Freeze).await?;
            engine.write_flat(&entry.record, frozen, name).await
        })
        .await
    }

    async fn write_flat(
        &self,
        record: &v1::Sandbox,
        frozen: Frozen,
        name: Name,
    ) -> Result<Template, Error> {
        // A staging directory of its own: the name of no object that will be.
        let scratch = Object::Template(TemplateId::random());
        let store = &self.shared.host.store;
        let volumes = find_volume_driver(&self.shared.host, &record.spec.volume_driver)?;
        let source = format!("disk of {}", crate::catalog::display_name(record));
        let flat = async {
            let directory =
                within(deadline::STORE, "staging the image", store.stage(&scratch)).await?;
            let image = directory.join(BASE_IMAGE);
            within(
                deadline::FLATTEN,
                "writing the disk out",
                volumes.flatten(&frozen.chain, &image),
            )
            .await?;
            let spec = &record.spec;
            let (geometry, kernel, env) = (spec.geometry, spec.kernel.clone(), spec.env.clone());
            self.import_image(
                &image,
                ImageRequest {
                    name,
                    geometry,
                    kernel,
                    env,
                    source,
                },
            )
            .await
        };
        let flat = caught("writing a disk out", flat).await;
        self.discard(&scratch).await;
        flat
    }

    /// All templates that can be used.
    #[must_use]
    pub fn templates(&self) -> Vec<Template> {
        let mut templates = self.shared.catalog.templates();
        templates.retain(|template| self.shared.catalog.template_flaw(template).is_none());
        templates
    }

    /// The templates of which something is missing or cannot be read, and what. They keep their names and what is left
    /// of them until they are removed.
    #[must_use]
    pub fn unusable_templates(&self) -> Vec<(Template, String)> {
        let catalog = &self.shared.catalog;
        let flawed = |template: Template| {
            let why = catalog.template_flaw(&template)?;
            Some((template, why))
        };
        catalog.templates().into_iter().filter_map(flawed).collect()
    }

    /// One template, by name, id or unique prefix of an id.
    pub fn template(&self, wanted: &str) -> Result<Template, Error> {
        self.shared
            .catalog
            .template(wanted)
            .map(|(template, _)| template)
    }

    /// One template, and why it cannot be used, if so.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn inspect_template(&self, wanted: &str) -> Result<(Template, Option<String>), Error> {
        let (template, _pin) = self.shared.catalog.any_template(wanted)?;
        let flaw = self.shared.catalog.template_flaw(&template);
        Ok((template, flaw))
    }

    /// Removes a template. What only it needed goes with it.
    ///
    /// # Errors
    /// Sandboxes that were created from it exist: they are named.
    pub async fn remove_template(&self, wanted: &str) -> Result<Template, Error> {
        let (template, pin) = self.shared.catalog.any_template(wanted)?;
        self.detached("removing a template", |engine| async move {
            let removed = engine.trash_template(template).await;
            drop(pin);
            engine.collect_soon();
            removed
        })
        .await
    }

    async fn trash_template(&self, template: Template) -> Result<Template, Error> {
        self.shared.catalog.forget_template(&template.id)?;
        let object = Object::Template(template.id.clone());
        let trashed = within(
            deadline::STORE,
            "removing the template",
            self.shared.host.store.trash(&object),
        );
        if let Err(error) = caught("removing a template", trashed).await {
            self.shared.catalog.add_template(template);
            return Err(error);
        }
        self.shared.events.emit(
            None,
            "template.removed",
            template.name.to_string(),
            &Steps::default(),
        );
        Ok(template)
    }
}
