//! What a report says of the queue and of faults.

use serde::Serialize;

use super::{Report, Row};
use crate::{
    samples::Quantiles,
    simulation::{FaultTally, QueueTally, TenantTally},
};

/// What the queue came to.
#[derive(Clone, Debug, Serialize)]
pub struct QueueRow {
    /// The admission policy before it, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admission: Option<AdmissionRow>,
    /// The most requests that waited at once.
    pub longest: u32,
    /// Classes, by name; what has none is of the class `""`.
    pub classes: Vec<ShareRow>,
    /// Tenants, in the order in which they were given.
    pub tenants: Vec<TenantRow>,
}

/// What let requests in.
#[derive(Clone, Debug, Serialize)]
pub struct AdmissionRow {
    /// Its name, as it was given.
    pub name: String,
    /// `name@version`.
    pub policy: String,
}

/// A class's or tenant's part of the work.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShareRow {
    /// Its name.
    pub name: String,
    /// Tokens of work, prompts and outputs, of its requests that started.
    pub work: u64,
    /// Its share of all work.
    pub share: f64,
}

/// What a tenant's requests came to.
#[derive(Clone, Debug, Serialize)]
pub struct TenantRow {
    /// Its work.
    #[serde(flatten)]
    pub work: ShareRow,
    /// Its share of the tier's work that started while each tenant of the tier had requests waiting; 0 if that never was.
    pub contended_share: f64,
    /// Its class.
    pub class: String,
    /// Its tier.
    pub tier: u32,
    /// Its weight in its class.
    pub weight: f32,
    /// Requests that came.
    pub came: u64,
    /// Served to their end.
    pub served: u64,
    /// Refused by the policy.
    pub rejected: u64,
    /// Not let in by the admission policy.
    pub shed: u64,
    /// Refused because the queue was full.
    pub refused: u64,
    /// They waited until their deadline.
    pub expired: u64,
    /// Their clients left.
    pub left: u64,
    /// Their last attempt failed.
    pub failed: u64,
    /// Time in the queue in milliseconds, of those that started.
    pub wait: Quantiles,
    /// Time to first token in milliseconds.
    pub ttft: Quantiles,
}

/// What faults came to.
#[derive(Clone, Debug, Serialize)]
pub struct FaultRow {
    /// Their counts.
    #[serde(flatten)]
    pub faults: FaultTally,
    /// Requests that were given up after their last attempt failed.
    pub failed: u64,
}

impl QueueRow {
    pub(super) fn new(tally: &QueueTally) -> Self {
        let all = tally.tenants.iter().map(|tenant| tenant.work).sum::<u64>().max(1) as f64;
        let contended = |tier: u32| {
            let of_tier = tally.tenants.iter().filter(|tenant| tenant.admitted.tier == tier);
            of_tier.map(|tenant| tenant.contended_work).sum::<u64>().max(1) as f64
        };
        let share = |name: &str, tenants: &[&TenantTally]| {
            let work = tenants.iter().map(|tenant| tenant.work).sum::<u64>();
            ShareRow { name: name.to_owned(), work, share: work as f64 / all }
        };
        let class_of = |tenant: &TenantTally| tenant.admitted.class.as_deref().unwrap_or_default().to_owned();
        let mut names: Vec<String> = tally.tenants.iter().map(class_of).collect();
        names.sort();
        names.dedup();
        let classes = names.iter().map(|name| {
            let of_class: Vec<_> = tally.tenants.iter().filter(|tenant| class_of(tenant) == *name).collect();
            share(name, &of_class)
        });
        let tenants = tally.tenants.iter().map(|tenant| TenantRow {
            work: share(&tenant.name, &[tenant]),
            contended_share: tenant.contended_work as f64 / contended(tenant.admitted.tier),
            class: class_of(tenant),
            tier: tenant.admitted.tier,
            weight: tenant.admitted.tenant_weight,
            came: tenant.came,
            served: tenant.served,
            rejected: tenant.rejected,
            shed: tenant.shed,
            refused: tenant.refused,
            expired: tenant.expired,
            left: tenant.left,
            failed: tenant.failed,
            wait: tenant.waits(),
            ttft: tenant.ttft(),
        });
        let admission = tally.admission.clone().map(|(name, policy)| AdmissionRow { name, policy });
        Self { admission, longest: tally.longest, classes: classes.collect(), tenants: tenants.collect() }
    }
}

/// What let requests in before the queue, for the heading: it is the same for all that are compared.
pub(super) fn admission(report: &Report) -> String {
    let queue = report.policies.first().and_then(|row| row.queue.as_ref());
    let admission = queue.and_then(|queue| queue.admission.as_ref());
    admission.map_or_else(String::new, |AdmissionRow { name, policy }| format!(", let in by {name} ({policy})"))
}

/// A column of the queues' table: what stands above it, and what it says of a tenant.
type Column = (&'static str, fn(&TenantRow) -> String);

const COLUMNS: &[Column] = &[
    ("tenant", |row| row.work.name.clone()),
    ("tier", |row| row.tier.to_string()),
    ("class", |row| row.class.clone()),
    ("weight", |row| row.weight.to_string()),
    ("came", |row| row.came.to_string()),
    ("served", |row| row.served.to_string()),
    ("shed", |row| row.shed.to_string()),
    ("refused", |row| row.refused.to_string()),
    ("expired", |row| row.expired.to_string()),
    ("left", |row| row.left.to_string()),
    ("failed", |row| row.failed.to_string()),
    ("wait mean", |row| format!("{:.1}", row.wait.mean)),
    ("p50", |row| format!("{:.1}", row.wait.p50)),
    ("p99", |row| format!("{:.1}", row.wait.p99)),
    ("TTFT p50", |row| format!("{:.1}", row.ttft.p50)),
    ("p99", |row| format!("{:.1}", row.ttft.p99)),
    ("share", |row| format!("{:.3}", row.work.share)),
    ("contended", |row| format!("{:.3}", row.contended_share)),
];

/// The table: what stands above the columns, then a line for each policy's tenants. `None` without any.
pub(super) fn table(report: &Report) -> Option<Vec<Vec<String>>> {
    let heads = std::iter::once("queue".to_owned()).chain(COLUMNS.iter().map(|(name, _)| (*name).to_owned())).collect();
    let lines = report.policies.iter().flat_map(|policy| {
        let tenants = policy.queue.iter().flat_map(|queue| &queue.tenants);
        tenants.map(|row| std::iter::once(policy.name.clone()).chain(COLUMNS.iter().map(|(_, cell)| cell(row))).collect())
    });
    let table: Vec<Vec<String>> = std::iter::once(heads).chain(lines).collect();
    (table.len() > 1).then_some(table)
}

/// What a reader must know of faults, and of what the books were checked against.
pub(super) fn notes(row: &Row) -> Vec<String> {
    let faults = row.faults.as_ref().map(|FaultRow { faults, failed }| {
        let FaultTally { died, slow, hung, interrupted, migrated, tokens_kept } = faults;
        format!(
            "{}: engines died {died} times, were slow {slow} times and hung {hung} times; {interrupted} times a request lost its \
             worker, {migrated} times with output, {tokens_kept} tokens of it, which it kept; {failed} requests failed",
            row.name
        )
    });
    faults.into_iter().collect()
}
