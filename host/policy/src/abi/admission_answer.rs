//! `admission-answer`: what the policy says, taken down as it is said. It is judged when the call has returned.

use dynamo_host_core::{
    Admitted,
    admission::{Answer, MAX_CLASS_BYTES},
};
use wasmtime::component::{ComponentNamedList, Lift};

use super::{Bytes, Interface, define_void};
use crate::call::Guest;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define_void(interface, "set-class", |guest: &mut Guest, (class,): (String,)| {
        guest.admit("set-class")?;
        // One byte more than is allowed is enough to see that it is too long.
        guest.admitted.class = Some(class[..class.ceil_char_boundary(MAX_CLASS_BYTES + 1)].into());
        Ok(class.len())
    })?;
    set(interface, "set-tier", |admitted, (tier,): (u32,)| admitted.tier = tier)?;
    set(interface, "set-class-weight", |admitted, (weight,): (f32,)| admitted.class_weight = weight)?;
    set(interface, "set-tenant-weight", |admitted, (weight,): (f32,)| admitted.tenant_weight = weight)?;
    set(interface, "set-priority", |admitted, (priority,): (f32,)| admitted.priority = priority)?;
    set(interface, "set-deadline-ms", |admitted, (deadline,): (u32,)| admitted.deadline_ms = Some(deadline))?;
    define_void(interface, "admit", |guest: &mut Guest, (): ()| answer(guest, "admit", Answer::Admit, 0))?;
    define_void(interface, "shed", |guest: &mut Guest, (status, retry_after_ms, reason): (u16, Option<u32>, String)| {
        let rejection = guest.rejection(status, retry_after_ms, &reason);
        answer(guest, "shed", Answer::Shed(rejection), reason.len())
    })
}

/// A function that says where the request stands.
fn set<P>(interface: &mut Interface<'_>, name: &'static str, write: fn(&mut Admitted, P)) -> wasmtime::Result<()>
where
    P: ComponentNamedList + Lift + 'static,
{
    define_void(interface, name, move |guest: &mut Guest, params: P| {
        guest.admit(name)?;
        write(&mut guest.admitted, params);
        Ok(0)
    })
}

fn answer(guest: &mut Guest, function: &'static str, answer: Answer, bytes: Bytes) -> wasmtime::Result<Bytes> {
    guest.admit(function)?;
    guest.admission = Some(answer);
    Ok(bytes)
}
