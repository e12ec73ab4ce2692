//! Fork: more sandboxes like this one. The sandbox stays where it is.
//!
//! 1. Running: a [checkpoint](super::checkpoint), which stays listed. Paused: its generation is there already.
//! 2. Each fork is created from that generation like a sandbox from a snapshot template: a directory, a slot of its
//!    own, a copy of the device state, a head over the layer, a private mapping of the memory. O(1) each, and they
//!    share nothing that they write (INV-38).
//!
//! Until each fork has its copy, the generation is neither retired nor destroyed with the sandbox.
//!
//! Step 1 is the sandbox's; step 2 is [`crate::Engine`]'s, one creation for each fork, and each is all or nothing.

use crate::error::Error;
use crate::layout::Object;
use crate::manifest::v1::{Capture, MadeBy, Rest};
use crate::phase::Verb;
use crate::sandbox::{Origin, Sandbox};

impl Sandbox {
    pub(crate) async fn fork_origin(&mut self) -> Result<Origin, Error> {
        self.admit(Verb::Fork).await?;
        if let Rest::Paused { generation } = self.record().rests {
            let capture = self
                .shared
                .catalog
                .generation(self.id(), generation)?
                .capture;
            let object = Object::Generation(self.id().clone(), generation);
            return Ok(self.origin(object, capture));
        }
        let made = self.capture_running(Verb::Fork, MadeBy::Fork).await?;
        let object = Object::Generation(self.id().clone(), made.number);
        Ok(self.origin(object, made.capture))
    }

    fn origin(&self, object: Object, capture: Capture) -> Origin {
        // The record reaches them at this moment, so nothing can have collected them.
        let objects = [
            Object::Layer(capture.layer.clone()),
            Object::Memory(capture.memory.clone()),
            object.clone(),
        ];
        let pin = self.shared.catalog.pin(objects);
        Origin {
            object,
            capture,
            _pin: pin,
        }
    }
}
