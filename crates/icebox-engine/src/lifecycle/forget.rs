//! Forget: a generation or a branch less. The sandbox stays where it is.
//!
//! 1. Refuse what is in use: the generation at which the sandbox rests, and one that forks are being made from.
//! 2. Commit the record without it. From here on it does not exist.
//! 3. Remove the generation's directory. Layers and memories that only it referred to are collected.
//!
//! A disk that goes on from a point needs no point: it keeps the layers and the memory under it by itself.

use crate::catalog::display_name;
use crate::error::Error;
use crate::id::GenerationNo;
use crate::layout::Object;
use crate::manifest::v1::{Point, Rest};
use crate::phase::Verb;
use crate::sandbox::Sandbox;

impl Sandbox {
    pub(crate) async fn forget(&mut self, point: &Point) -> Result<(), Error> {
        self.admit(Verb::Forget).await?;
        let steps = self.steps.clone();
        match point {
            Point::Generation(number) => {
                self.check_unused(*number)?;
                let gone = [*number];
                steps.time("commit", self.unlist(&gone, &[])).await?;
            }
            Point::Branch(name) => {
                let gone = [self.branch(name)?.name];
                steps.time("commit", self.unlist(&[], &gone)).await?;
            }
        }
        self.emit("sandbox.forgot", point.to_string(), &steps);
        Ok(())
    }

    fn check_unused(&self, number: GenerationNo) -> Result<(), Error> {
        let record = self.record();
        if !record.generations.contains(&number) {
            return Err(Error::NoGeneration {
                wanted: number,
                have: record.generations.clone(),
            });
        }
        let user = if record.rests == (Rest::Paused { generation: number }) {
            Some(format!(
                "sandbox {}, which is paused at it",
                display_name(record)
            ))
        } else {
            let object = Object::Generation(record.id.clone(), number);
            let is_pinned = self.shared.catalog.is_pinned(&object);
            is_pinned.then(|| "forks that are being made from it".to_owned())
        };
        match user {
            None => Ok(()),
            Some(user) => Err(Error::InUse {
                what: format!("generation {number}"),
                users: vec![user],
            }),
        }
    }
}
