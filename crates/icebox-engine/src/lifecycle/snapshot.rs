//! Snapshot: a template that holds the disk, the memory and the devices of one instant. The sandbox stays where it is.
//!
//! Running: capture into the template, the guest runs on at once, and connections to it live through it; commit the
//! new head. Paused: the template refers to
//! the generation's layer and memory, and copies its device state; nothing is revived (INV-23).
//!
//! The commit point is the publication of the template's directory. Its name is taken before anything begins (INV-22).

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::engine::Defaults;
use crate::error::Error;
use crate::id::{Name, TemplateId};
use crate::layout::{DEVICE_STATE, Object};
use crate::lifecycle::capture::Then;
use crate::manifest;
use crate::manifest::v1::{Capture, Rest, Template, TemplateContent};
use crate::phase::Verb;
use crate::sandbox::Sandbox;
use crate::steps::Steps;

impl Sandbox {
    /// `defaults` are those of sandboxes made from the template, where they are not this one's.
    pub(crate) async fn snapshot(
        &mut self,
        name: Name,
        defaults: Option<Defaults>,
    ) -> Result<Template, Error> {
        self.admit(Verb::Snapshot).await?;
        let _reserved = {
            let team = &self.record().spec.team;
            self.shared.catalog.reserve_template_name(team, &name)?
        };
        let steps = self.steps.clone();
        let id = TemplateId::random();
        let template = match self.record().rests {
            Rest::Paused { generation } => {
                let capture = self
                    .shared
                    .catalog
                    .generation(self.id(), generation)?
                    .capture;
                let template = self.template_maker(id, name, defaults)(&capture);
                let from = Object::Generation(self.id().clone(), generation);
                let published = self.publish_copy(&from, &template);
                steps.time("publish", published).await?;
                self.shared.catalog.add_template(1, template.clone());
                template
            }
            _ => {
                let maker = self.template_maker(id.clone(), name, defaults);
                self.snapshot_running(id, maker, &steps).await?
            }
        };
        self.emit(
            "template.created",
            format!("{} from a snapshot", template.name),
            &steps,
        );
        Ok(template)
    }

    async fn snapshot_running(
        &mut self,
        id: TemplateId,
        maker: impl Fn(&Capture) -> Template,
        steps: &Steps,
    ) -> Result<Template, Error> {
        let machine = self.machine(Verb::Snapshot)?;
        self.check_opened()?;
        let object = Object::Template(id);
        let mut attempt = self.begin_capture(object.clone());
        let document = |capture: &_| manifest::encode(1, &maker(capture));
        let captured = self
            .capture(&*machine, &mut attempt, Then::RunsOn, steps, document)
            .await;
        let committed = match captured {
            Ok(capture) => {
                let commit = self.update(|record| attempt.record(record));
                steps.time("commit", commit).await.map(|()| capture)
            }
            Err(error) => Err(error),
        };
        match committed {
            Ok(capture) => {
                let template = maker(&capture);
                self.shared.catalog.add_template(1, template.clone());
                self.named(&object);
                Ok(template)
            }
            Err(error) => {
                self.abandon_capture(&*machine, attempt).await?;
                Err(error)
            }
        }
    }

    fn template_maker(
        &self,
        id: TemplateId,
        name: Name,
        defaults: Option<Defaults>,
    ) -> impl Fn(&Capture) -> Template + use<> {
        let (spec, now) = (self.record().spec.clone(), self.shared.now());
        let Defaults { env, login } = defaults.unwrap_or_else(|| Defaults {
            env: spec.env.clone(),
            login: spec.login.clone(),
        });
        let source = format!(
            "snapshot of {}",
            crate::catalog::display_name(self.record())
        );
        move |capture| Template {
            id: id.clone(),
            name: name.clone(),
            team: spec.team.clone(),
            public: false,
            content: TemplateContent::Snapshot {
                capture: Box::new(capture.clone()),
            },
            geometry: spec.geometry,
            disk_size: spec.disk_size,
            kernel: spec.kernel.clone(),
            env: env.clone(),
            login: login.clone(),
            source: source.clone(),
            created_at: now,
            warm: 0,
        }
    }

    /// Publishes a template with a copy of another object's device state.
    async fn publish_copy(&mut self, from: &Object, template: &Template) -> Result<(), Error> {
        let into = Object::Template(template.id.clone());
        self.making(vec![into.clone()]);
        let store = Arc::clone(&self.shared.host.store);
        let published = within(deadline::STORE, "publishing the template", async {
            store.stage(&into).await?;
            store.copy_into_staging(from, DEVICE_STATE, &into).await?;
            store.publish(&into, &manifest::encode(1, template)).await
        });
        let published = published.await;
        match &published {
            Ok(()) => drop(self.named(&into)),
            Err(_) => self.discard_unnamed().await,
        }
        published
    }
}
