//! Warm sandboxes: made from a template before anybody asks for one, and given to who does.
//!
//! One is an ordinary sandbox whose record says that it [waits](crate::manifest::v1::Sandbox::waits). Nobody sees it, nobody is let in, and
//! its team's limits count it. A create that wants just what it is [takes](crate::lifecycle) it by one write of its manifest;
//! any other create does not touch it. What waits is no property of anybody's: it is removed, not paused, when the daemon
//! drains, and a start removes what an earlier daemon had waiting and makes it anew.
//!
//! One task keeps as many as each template is to have. Only it makes them and only with [`Shared::warming`] held, so that
//! who lowers the number or removes the template finds them all.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::oneshot;

use super::{CreateRequest, Engine, SandboxView, ask};
use crate::catalog::Entry;
use crate::error::Error;
use crate::id::{Name, TemplateId};
use crate::lifecycle::Taking;
use crate::manifest::v1::{Lifetime, Spec, Template};
use crate::sandbox::{Chained, Request, Shared};
use crate::steps::Steps;

/// The most for one template: beyond that, what waits costs more than waiting does.
const MOST: u16 = 64;
/// Before what failed is tried again; then ever more rarely.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// Keeps as many sandboxes waiting as templates say, until the engine ends.
pub(super) async fn keep(shared: Weak<Shared>) {
    let mut pause = RETRY;
    let Some(mut changed) = shared.upgrade().map(|it| it.warmth.subscribe()) else {
        return;
    };
    loop {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        changed.mark_unchanged();
        let failed = Engine::over(shared).warm_up().await;
        if failed {
            tokio::time::sleep(pause).await;
            pause = RETRY_MAX.min(pause * 2);
        } else {
            pause = RETRY;
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Engine {
    /// How many sandboxes of a template wait for somebody to create one.
    #[must_use]
    pub fn waiting(&self, template: &TemplateId) -> usize {
        let is_whole = |entry: &Entry| !entry.is_spoilt();
        let waiting = self.shared.catalog.waiting().into_iter();
        waiting
            .filter(|it| it.record.spec.template == *template && is_whole(it))
            .count()
    }

    /// Has `count` sandboxes made from a template wait from now on, running, for whoever creates one. They are made in the
    /// background; those that are too many are gone when this returns.
    ///
    /// # Errors
    /// It is another team's; the number is too large; or it could not be written down, or one would not go.
    pub async fn set_warm(&self, wanted: &str, count: u16) -> Result<Template, Error> {
        if count > MOST {
            return Err(Error::Invalid {
                message: format!("{count} sandboxes of one template cannot wait"),
                hint: format!("ask for at most {MOST}"),
            });
        }
        let (template, pin) = self.shared.catalog.own_template(&self.scope, wanted)?;
        self.detached("setting how many sandboxes wait", |engine| async move {
            let _alone = engine.shared.warming.lock().await;
            let change = |template: &mut Template| template.warm = count;
            let changed = engine.rewrite_template(&template.id, change).await;
            drop(pin);
            let changed = changed?;
            engine.cool(&changed.id, count.into()).await?;
            engine.shared.warmth.send_replace(());
            Ok(changed)
        })
        .await
    }

    /// Removes sandboxes that wait until at most `keep` of a template's are left. With [`Shared::warming`] held.
    pub(super) async fn cool(&self, template: &TemplateId, keep: usize) -> Result<(), Error> {
        let mut waiting = self.shared.catalog.waiting();
        waiting.retain(|it| it.record.spec.template == *template);
        for entry in waiting.iter().skip(keep) {
            self.discard_waiting(entry).await?;
        }
        Ok(())
    }

    /// Removes a sandbox if it still waits. Whether it did.
    pub(super) async fn discard_waiting(&self, entry: &Entry) -> Result<bool, Error> {
        let (reply, answer) = oneshot::channel();
        let asked = entry.mailbox.send(Request::Discard(reply)).await;
        let discarded = match asked {
            Ok(()) => answer.await.unwrap_or(Ok(true)),
            Err(_gone) => Ok(true),
        };
        self.collect_soon();
        discarded
    }

    /// The sandbox that waits for somebody who wants just this, if one does and can still be had.
    ///
    /// # Errors
    /// The name is taken; or it is not known whether the sandbox is the caller's now.
    pub(super) async fn take_warm(
        &self,
        spec: &Spec,
        lifetime: &Lifetime,
        name: Option<&Name>,
    ) -> Result<Option<SandboxView>, Error> {
        let Some((entry, reserved)) = self.shared.catalog.claim(spec, name)? else {
            return Ok(None);
        };
        let taking = Taking {
            spec: spec.clone(),
            lifetime: lifetime.clone(),
            name: name.cloned(),
            reserved,
        };
        self.detached("taking a warm sandbox", |engine| async move {
            let taken = ask(&entry, |reply| Request::Take(Box::new(taking), reply)).await;
            engine.shared.warmth.send_replace(());
            match taken {
                Ok(true) => engine.inspect(entry.record.id.as_str()).map(Some),
                Ok(false) | Err(Error::Destroyed) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Brings every template to as many sandboxes as are to wait. Whether something failed.
    async fn warm_up(&self) -> bool {
        let catalog = &self.shared.catalog;
        let mut failed = BTreeSet::new();
        loop {
            let _alone = self.shared.warming.lock().await;
            let (waiting, templates) = (catalog.waiting(), catalog.templates(&self.scope));
            for entry in waiting.iter().filter(|entry| entry.is_spoilt()) {
                let why = "a sandbox that waited does not run any more";
                if self.discarded(entry).await {
                    failed.insert(entry.record.spec.template.clone());
                    let template = &entry.record.spec.template;
                    if let Some(template) = templates.iter().find(|it| it.id == *template) {
                        self.say(template, "template.warm-failed", why);
                    }
                }
            }
            for entry in &waiting {
                let is_there = |it: &Template| it.id == entry.record.spec.template;
                if !templates.iter().any(is_there) {
                    self.discarded(entry).await;
                }
            }
            if self.shared.require_open().is_err() {
                return false;
            }
            let lacks = templates.iter().find(|template| {
                let of_it = |it: &&Entry| it.record.spec.template == template.id;
                let wait = waiting.iter().filter(of_it).count();
                !failed.contains(&template.id) && wait < usize::from(template.warm)
            });
            let Some(template) = lacks else {
                return !failed.is_empty();
            };
            match self.warm_one(template).await {
                Ok(()) => {
                    let (waiting, warm) = (self.waiting(&template.id), template.warm);
                    let detail = format!("{waiting} of {warm} sandboxes wait");
                    self.say(template, "template.warmed", &detail);
                }
                Err(error) => {
                    failed.insert(template.id.clone());
                    let why = Chained(&error).to_string();
                    self.say(template, "template.warm-failed", &why);
                }
            }
        }
    }

    async fn discarded(&self, entry: &Entry) -> bool {
        let discarded = self.discard_waiting(entry).await;
        discarded.unwrap_or_else(|error| {
            tracing::error!(sandbox = %entry.record.id, error = %Chained(&error), "a warm sandbox will not go");
            true
        })
    }

    fn say(&self, template: &Template, kind: &str, what: &str) {
        let detail = format!("{}: {what}", template.name);
        let events = &self.shared.events;
        events.emit(Some(&template.team), None, kind, detail, &Steps::default());
    }

    /// Makes one sandbox that waits, with all that the template says and nothing else.
    async fn warm_one(&self, template: &Template) -> Result<(), Error> {
        let engine = self.of_team(template.team.clone());
        let request = CreateRequest {
            template: template.id.to_string(),
            egress: self.shared.config.warm_egress,
            ..CreateRequest::default()
        };
        let (spec, beginning) = engine.plan(&request).await?;
        let made = engine.make(spec, Lifetime::default(), None, true, beginning);
        made.await.map(drop)
    }

    /// The whole engine.
    fn over(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            scope: crate::team::Scope::Everything,
        }
    }
}
