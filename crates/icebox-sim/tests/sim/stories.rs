//! What every story has around it: both kinds of volume driver, and an end with nothing left.

use icebox_engine::Engine;
use icebox_sim::fault::{Injector, inject};
use icebox_sim::{FreezeBy, World};

use crate::support::{import_image, leave_nothing, life, open};

/// Tells a story on both kinds of volume driver, and ends it with nothing left.
pub(crate) fn story(tell: impl AsyncFn(&World, &Engine)) {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        life(async || {
            let world = World::new();
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            tell(&world, &engine).await;
            leave_nothing(&world, &engine).await;
        });
    }
}

/// A story on a host of which steps can be broken.
pub(crate) fn story_of_faults(tell: impl AsyncFn(&World, &Injector, &Engine)) {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        life(async || {
            let (world, injector) = (World::new(), Injector::new());
            let engine = open(inject(world.host(freeze), &injector)).await;
            import_image(&world, &engine).await;
            tell(&world, &injector, &engine).await;
            leave_nothing(&world, &engine).await;
        });
    }
}
