//! `request`: facts of the request being decided.

use dynamo_host_core::{RequestFacts, UNKNOWN};

use super::{Interface, define};
use crate::{call::Guest, runtime::Now};

/// What an unknown 64-bit amount is.
const UNKNOWN_U64: u64 = u64::MAX;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    fact(interface, "decision-id", |request| request.decision_id)?;
    text(interface, "model", |request| Some(&*request.model), std::option::Option::unwrap_or_default)?;
    text(interface, "adapter", |request| request.adapter.as_deref(), |text| text)?;
    fact(interface, "endpoint", |request| request.endpoint.code())?;
    fact(interface, "stage", |request| request.stage.code())?;
    text(interface, "tenant", |request| request.tenant.as_deref(), |text| text)?;
    fact(interface, "tenant-key", RequestFacts::tenant_key)?;
    fact(interface, "session-key", |request| request.session_key)?;
    fact(interface, "parent-session-key", |_| None::<u64>)?;
    fact(interface, "prefix-key", |request| request.prefix_key)?;
    fact(interface, "prompt-tokens", |request| request.prompt.tokens)?;
    fact(interface, "prompt-tokens-exact", |request| request.prompt.exact)?;
    fact(interface, "generated-tokens", |request| request.generated_tokens)?;
    fact(interface, "max-output-tokens", |request| request.max_output_tokens.unwrap_or(UNKNOWN))?;
    fact(interface, "expected-output-tokens", |request| request.expected_output_tokens.unwrap_or(UNKNOWN))?;
    fact(interface, "choices", |request| request.choices)?;
    fact(interface, "flags", |request| request.flags)?;
    fact(interface, "multimodal-items", |request| request.multimodal_items)?;
    fact(interface, "multimodal-bytes", |request| if request.multimodal_items == 0 { 0 } else { UNKNOWN_U64 })?;
    fact(interface, "priority-tier", |request| request.tier)?;
    fact(interface, "priority", |request| request.priority as f32)?;
    text(interface, "class", |request| request.class.as_deref(), |text| text)?;
    timed(interface, "age-ms", |request, now| saturate(now.monotonic_ms.saturating_sub(request.accepted_ms)))?;
    timed(interface, "deadline-ms", |request, now| Some(saturate(request.deadline_ms?.saturating_sub(now.monotonic_ms))))?;
    fact(interface, "slo-ttft-ms", |request| request.slo.ttft_ms.unwrap_or(f32::NAN))?;
    fact(interface, "slo-itl-ms", |request| request.slo.itl_ms.unwrap_or(f32::NAN))?;
    fact(interface, "attempt", |request| request.attempt)?;
    fact(interface, "holds", |request| request.holds)?;
    fact(interface, "failed-workers", |request| request.failed_workers.iter().map(|worker| worker.0).collect::<Vec<u64>>())?;
    fact(interface, "pinned-worker", |_| None::<u64>)?;
    fact(interface, "affinity-worker", |_| None::<u64>)?;
    fact(interface, "tags", |_| Vec::<String>::new())?;
    define(interface, "attribute", |guest: &mut Guest, (key,): (String,)| {
        let value = guest.asked("attribute")?.0.attributes.get(&key).cloned();
        let bytes = key.len() + value.as_ref().map_or(0, String::len);
        Ok((value, bytes))
    })
}

fn saturate(ms: u64) -> u32 {
    u32::try_from(ms).unwrap_or(UNKNOWN - 1)
}

/// A fact that depends on the request alone.
fn fact<R>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&RequestFacts) -> R + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    R: wasmtime::component::Lower + wasmtime::component::ComponentType + 'static,
{
    timed(interface, name, move |request, _| read(request))
}

/// A fact that also depends on the time.
fn timed<R>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&RequestFacts, Now) -> R + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    R: wasmtime::component::Lower + wasmtime::component::ComponentType + 'static,
{
    define(interface, name, move |guest: &mut Guest, (): ()| {
        let (request, now) = guest.asked(name)?;
        Ok((read(request, now), 0))
    })
}

/// A text, charged by its length.
fn text<R>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&RequestFacts) -> Option<&str> + Send + Sync + 'static,
    shape: impl Fn(Option<String>) -> R + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    R: wasmtime::component::Lower + wasmtime::component::ComponentType + 'static,
{
    define(interface, name, move |guest: &mut Guest, (): ()| {
        let text = read(guest.asked(name)?.0).map(str::to_owned);
        let bytes = text.as_ref().map_or(0, String::len);
        Ok((shape(text), bytes))
    })
}
