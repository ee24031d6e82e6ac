//! Hand-offs between the workers of a model: who fits whom and why not, and what a model's workers do together.
//!
//! Two workers fit if they hand KV over in one way, with blocks of one size, and compute the same for the same prompt, as far as
//! can be seen from outside. What is not known of one is taken to be as with most others. A worker that fits nobody of those
//! that it is there for is told with whom, and in what it differs. Pure.

use std::collections::{BTreeMap, HashMap};

use dynamo_engine_api::Protocol;
use dynamo_host_core::{Role, id};
use serde::Serialize;

/// What decides who fits whom, as far as is known of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) protocol: Option<Protocol>,
    /// Tokens of a KV block.
    pub(super) block_size: Option<u32>,
    /// Key of the tokens that it makes of a text that is the same for all.
    pub(super) tokens: Option<u64>,
    /// Its longest context in tokens.
    pub(super) context: Option<u32>,
}

/// One worker that has a part in hand-offs.
#[derive(Clone, Debug)]
pub(super) struct Claim<'a> {
    /// Its engine's name and kind: ranks of one engine are nobody to hand to.
    pub(super) engine: &'a str,
    pub(super) kind: &'static str,
    pub(super) model: &'a str,
    pub(super) role: Role,
    pub(super) shape: Shape,
    /// Whether the engine was ever reached.
    pub(super) is_known: bool,
}

/// Whether a worker fits others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Fit {
    /// Nobody is there for it to fit, or nothing is known of it.
    #[default]
    Alone,
    /// It fits those of the same key.
    With(u64),
    /// It fits none of those that it is there for: in what it differs.
    Nobody(String),
}

/// What it finds of each, in their order.
pub(super) fn fits(claims: &[Claim<'_>]) -> Vec<Fit> {
    let mut models: HashMap<&str, Vec<usize>> = HashMap::new();
    for (at, claim) in claims.iter().enumerate() {
        models.entry(claim.model).or_default().push(at);
    }
    let mut found = vec![Fit::Alone; claims.len()];
    for of_model in models.into_values() {
        let claims: Vec<&Claim<'_>> = of_model.iter().map(|&at| &claims[at]).collect();
        for (&at, fit) in of_model.iter().zip(fits_of_model(&claims)) {
            found[at] = fit;
        }
    }
    found
}

/// What workers of one shape do, and on which engines: two names of each are enough to find another than one's own.
#[derive(Default)]
struct Same<'a> {
    prefill: Vec<&'a str>,
    decode: Vec<&'a str>,
    count: usize,
}

impl<'a> Same<'a> {
    fn add(&mut self, claim: &Claim<'a>) {
        self.count += 1;
        for (does, engines) in [(claim.role.prefills(), &mut self.prefill), (claim.role.decodes(), &mut self.decode)] {
            if does && engines.len() < 2 && !engines.contains(&claim.engine) {
                engines.push(claim.engine);
            }
        }
    }

    /// Somebody of another engine who does the other part.
    fn counterpart_of(&self, claim: &Claim<'_>) -> Option<&'a str> {
        let parts = [(claim.role.prefills(), &self.decode), (claim.role.decodes(), &self.prefill)];
        let mut others = parts.into_iter().filter(|(does, _)| *does).flat_map(|(_, engines)| engines);
        others.find(|&&engine| engine != claim.engine).copied()
    }
}

fn fits_of_model(claims: &[&Claim<'_>]) -> Vec<Fit> {
    let shapes = completed(claims);
    let mut same: HashMap<Shape, Same<'_>> = HashMap::new();
    for (claim, shape) in claims.iter().zip(&shapes).filter(|(_, shape)| shape.protocol.is_some()) {
        same.entry(*shape).or_default().add(claim);
    }
    let fit = |(claim, shape): (&&Claim<'_>, &Shape)| {
        if shape.protocol.is_none() {
            return if claim.is_known { Fit::Nobody(no_protocol(claim)) } else { Fit::Alone };
        }
        if same[shape].counterpart_of(claim).is_some() {
            return Fit::With(key(claim.model, shape));
        }
        // Those that most others are like.
        let others = same.iter().filter_map(|(other, of)| of.counterpart_of(claim).map(|engine| (of.count, engine, other)));
        let most = others.max_by_key(|(count, engine, _)| (*count, std::cmp::Reverse(*engine)));
        most.map_or(Fit::Alone, |(_, engine, other)| Fit::Nobody(difference(claim, shape, engine, other)))
    };
    claims.iter().zip(&shapes).map(fit).collect()
}

/// Their shapes; what is not known of one is as with most of its protocol.
fn completed(claims: &[&Claim<'_>]) -> Vec<Shape> {
    let usual = |protocol: Option<Protocol>| {
        let of: Vec<Shape> = claims.iter().map(|claim| claim.shape).filter(|shape| shape.protocol == protocol).collect();
        let most = |value: &dyn Fn(&Shape) -> Option<u64>| {
            let mut counts: BTreeMap<u64, u32> = BTreeMap::new();
            of.iter().filter_map(value).for_each(|value| *counts.entry(value).or_default() += 1);
            counts.into_iter().max_by_key(|&(value, count)| (count, std::cmp::Reverse(value))).map(|(value, _)| value)
        };
        let least = |value: Option<u64>| value.map(|value| value as u32);
        Shape {
            protocol,
            block_size: least(most(&|shape| shape.block_size.map(u64::from))),
            tokens: most(&|shape| shape.tokens),
            context: least(most(&|shape| shape.context.map(u64::from))),
        }
    };
    let mut known: HashMap<Option<Protocol>, Shape> = HashMap::new();
    let complete = |claim: &&Claim<'_>| {
        let shape = claim.shape;
        let usual = known.entry(shape.protocol).or_insert_with(|| usual(shape.protocol));
        Shape {
            protocol: shape.protocol,
            block_size: shape.block_size.or(usual.block_size),
            tokens: shape.tokens.or(usual.tokens),
            context: shape.context.or(usual.context),
        }
    };
    claims.iter().map(complete).collect()
}

fn key(model: &str, shape: &Shape) -> u64 {
    let Shape { protocol, block_size, tokens, context } = shape;
    id::key(format!("{model}\0{protocol:?}\0{block_size:?}\0{tokens:?}\0{context:?}").as_bytes())
}

fn no_protocol(claim: &Claim<'_>) -> String {
    let Claim { kind, role, .. } = claim;
    format!(
        "role {role}, but nothing says how an engine of kind {kind} hands KV over; set handoff=nixl, mooncake, bootstrap or context, \
         or role=aggregated"
    )
}

/// In what it differs from those that it is there for, `other` among them.
fn difference(claim: &Claim<'_>, shape: &Shape, other: &str, of: &Shape) -> String {
    let pool = if claim.role == Role::Decode { "prefill" } else { "decode" };
    let them = format!("the {pool} workers of its model ({other})");
    let number = |value: Option<u32>| value.map_or_else(|| "an unknown number of".to_owned(), |value| value.to_string());
    if shape.protocol != of.protocol {
        let [ours, theirs] = [shape, of].map(|shape| shape.protocol.map_or("nothing", Protocol::name));
        format!("it hands KV over by {ours}, {them} by {theirs}; give both the same handoff=")
    } else if shape.block_size != of.block_size {
        let [ours, theirs] = [shape, of].map(|shape| number(shape.block_size));
        format!("mismatched block sizes: its KV blocks have {ours} tokens, those of {them} {theirs}; start both with the same")
    } else if shape.tokens != of.tokens {
        format!(
            "another model behind the same name: it makes other tokens of a text than {them}; start both with the same model, or \
             serve it under another name"
        )
    } else {
        let [ours, theirs] = [shape, of].map(|shape| number(shape.context));
        format!(
            "another model, or another setting, behind the same name: its longest context is {ours} tokens, that of {them} {theirs}; \
             start both with the same"
        )
    }
}

/// What a model's workers do together, where some of them are there for one part only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Together {
    /// Prefill and decode are apart, where a policy wants that.
    Split,
    /// Nobody prefills.
    NoPrefill,
    /// Nobody decodes.
    NoDecode,
    /// Both are there, and none can hand over to another.
    NoPair,
}

impl Together {
    pub(super) const ALL: [Self; 4] = [Self::Split, Self::NoPrefill, Self::NoDecode, Self::NoPair];

    /// Metric label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::NoPrefill => "no_prefill",
            Self::NoDecode => "no_decode",
            Self::NoPair => "no_pair",
        }
    }
}

/// One worker, for what its model's do together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) role: Role,
    pub(super) is_eligible: bool,
    pub(super) serves_whole: bool,
    /// Those that it can hand over to, now.
    pub(super) group: Option<u64>,
    /// It may come to be one of these: it is starting, or its hand-offs are being checked.
    pub(super) is_coming: bool,
}

/// How a model is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Disaggregation {
    pub(crate) model: String,
    pub(crate) state: Together,
    /// Why it is not split, and how to have it so.
    pub(crate) reason: Option<String>,
    /// It may be otherwise in a moment.
    pub(super) is_coming: bool,
}

impl Disaggregation {
    /// `None` where all workers are aggregated.
    pub(super) fn of(model: &str, parts: &[Part]) -> Option<Self> {
        if parts.iter().all(|part| part.role == Role::Aggregated) {
            return None;
        }
        let of = |does: fn(Role) -> bool| parts.iter().filter(move |part| does(part.role));
        let ready = |does: fn(Role) -> bool| of(does).filter(|part| part.is_eligible).count();
        let [prefill, decode] = [of(Role::prefills).count(), of(Role::decodes).count()];
        let mut groups: HashMap<u64, [u32; 3]> = HashMap::new();
        for part in parts.iter().filter(|part| part.is_eligible) {
            let Some(group) = part.group else { continue };
            let [prefill, decode, both] = groups.entry(group).or_default();
            *prefill += u32::from(part.role == Role::Prefill);
            *decode += u32::from(part.role == Role::Decode);
            *both += u32::from(part.role == Role::Both);
        }
        let has_pair =
            |[prefill, decode, both]: &[u32; 3]| (prefill + both > 0 && decode + both > 0) && prefill + decode + both > 1;
        let is_served = parts.iter().any(|part| part.is_eligible && part.serves_whole);
        let served = if is_served { "requests are served whole" } else { "requests cannot be served" };
        let (state, reason) = if groups.values().any(has_pair) {
            (Together::Split, None)
        } else if prefill == 0 {
            (
                Together::NoPrefill,
                Some(format!(
                    "no worker known to serve it has role prefill or both, so {served}; add one, or set role=aggregated"
                )),
            )
        } else if decode == 0 {
            (
                Together::NoDecode,
                Some(format!(
                    "no worker known to serve it has role decode or both, so {served}; add one, or set role=aggregated"
                )),
            )
        } else if ready(Role::prefills) == 0 {
            (Together::NoPrefill, Some(format!("none of its {prefill} prefill workers is ready, so {served} until one is")))
        } else if ready(Role::decodes) == 0 {
            (Together::NoDecode, Some(format!("none of its {decode} decode workers is ready, so {served} until one is")))
        } else {
            let reason =
                format!("no prefill worker can hand KV to a decode worker, so {served}; see what worker list says of them");
            (Together::NoPair, Some(reason))
        };
        let is_coming = state != Together::Split && parts.iter().any(|part| part.is_coming);
        Some(Self { model: model.to_owned(), state, reason, is_coming })
    }
}

#[cfg(test)]
mod tests;
