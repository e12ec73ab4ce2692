//! Guests and kernels in memory.

use async_trait::async_trait;
use icebox_engine::host::{
    BootFiles, ErrorKind, Guest, GuestAddress, HostError, Kernels, Secret, Welcome,
};
use icebox_engine::id::{Digest, SandboxId};

use crate::world::{State, Vcpus, World};

pub(crate) struct SimGuest {
    world: World,
}

pub(crate) struct SimKernels;

impl SimGuest {
    pub(crate) fn new(world: World) -> Self {
        Self { world }
    }

    /// A guest that stands still, or whose agent is wedged, does not answer.
    async fn answer<T>(
        &self,
        work: impl FnOnce(&mut State) -> Option<Result<T, HostError>>,
    ) -> Result<T, HostError> {
        let answer = {
            let mut state = self.world.lock();
            state.tick();
            if state.agent_wedged {
                None
            } else {
                work(&mut state)
            }
        };
        match answer {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }
}

fn wrong_token() -> HostError {
    HostError::new(ErrorKind::Invalid, "the agent does not accept that token")
}

/// The running guest at an address is the one whose network has that slot; here, the one with that token.
fn authorised(state: &State, token: &Secret) -> Option<Result<(), HostError>> {
    let mut running = state
        .vms
        .values()
        .filter(|vm| vm.vcpus == Vcpus::Running)
        .peekable();
    running.peek()?;
    Some(if running.any(|vm| vm.token == token.expose()) {
        Ok(())
    } else {
        Err(wrong_token())
    })
}

#[async_trait]
impl Guest for SimGuest {
    async fn welcome(&self, _at: GuestAddress, welcome: &Welcome) -> Result<(), HostError> {
        let sandbox: &SandboxId = &welcome.sandbox;
        self.answer(|state| {
            let vm = state
                .vms
                .get_mut(sandbox)
                .filter(|vm| vm.vcpus == Vcpus::Running)?;
            // A repeated welcome finds the new token in force already.
            if vm.token != welcome.current_token.expose() && vm.token != welcome.token.expose() {
                return Some(Err(wrong_token()));
            }
            welcome.token.expose().clone_into(&mut vm.token);
            vm.knows_time = true;
            let told = state.welcomes.entry(sandbox.clone()).or_default();
            told.push(welcome.clone());
            Some(Ok(()))
        })
        .await
    }

    async fn prepare(&self, _at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.answer(|state| authorised(state, token)).await
    }

    async fn is_working(&self, _at: GuestAddress, token: &Secret) -> Result<bool, HostError> {
        self.answer(|state| authorised(state, token).map(|known| known.map(|()| state.works)))
            .await
    }

    /// Beside verbs, so what happens in the guest at their steps does not happen here.
    async fn set_clock(&self, _at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        let told = {
            let mut state = self.world.lock();
            let deaf = state.agent_wedged;
            let mut running = state.vms.values_mut();
            let known = running
                .find(|vm| !deaf && vm.vcpus == Vcpus::Running && vm.token == token.expose());
            known.map(|vm| vm.knows_time = true)
        };
        match told {
            Some(()) => Ok(()),
            None => std::future::pending().await,
        }
    }

    async fn sync(&self, _at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.answer(|state| authorised(state, token)).await
    }
}

#[async_trait]
impl Kernels for SimKernels {
    async fn default_kernel(&self) -> Result<Digest, HostError> {
        Ok(Digest::from_bytes([7; 32]))
    }

    async fn boot_files(&self, _kernel: &Digest) -> Result<BootFiles, HostError> {
        Ok(BootFiles {
            kernel: "/sim/kernel".into(),
            initramfs: "/sim/initramfs".into(),
            agent: Digest::from_bytes([8; 32]),
        })
    }
}
