//! Changes that are written down: made and in the audit file before they are answered, whoever waits for them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    response::{IntoResponse, Response},
};
use dynamo_host_core::SlotName;
use dynamo_host_policy::SlotReport;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{Admin, AdminError, refusal};
use crate::{
    audit::{Audit, Entry, Who},
    policies::{ChangeError, Policies},
    tasks,
    text::plain,
};

/// Entries that are answered at most, and without being asked for so many.
const MAX_ENTRIES: usize = 10_000;
const ENTRIES: usize = 50;

/// How often is looked whether a policy is quarantined.
const QUARANTINES_EVERY: Duration = Duration::from_millis(500);

/// Which change of a slot is made, for the audit file.
pub(super) struct Of<'a> {
    pub(super) what: &'static str,
    pub(super) who: Who,
    pub(super) slot: &'a SlotName,
    /// Whether it waits for other changes.
    pub(super) takes_turn: bool,
}

/// Makes a change of a slot, writes it down, and answers with it.
pub(super) async fn change<T, Made>(
    admin: &Admin,
    of: Of<'_>,
    make: impl FnOnce(Admin, SlotName) -> Made,
) -> Result<Response, AdminError>
where
    T: Serialize + Send + 'static,
    Made: Future<Output = Result<T, ChangeError>> + Send + 'static,
{
    let Of { what, who, slot, takes_turn } = of;
    let name = slot.to_string();
    let change = make(admin.clone(), slot.clone());
    let (admin, (tell, told)) = (admin.clone(), oneshot::channel());
    tasks::spawn("change of a slot", async move {
        let turn = if takes_turn { Some(admin.audit.turn.lock().await) } else { None };
        let mut entry = Entry::new(what, who, Some(name.clone()));
        entry.from = standing(&admin.policies, &name);
        let made = change.await;
        entry.to = standing(&admin.policies, &name);
        entry.refused = made.as_ref().err().map(|error| plain(&error.to_string()));
        let not_audited = admin.audit.append(entry).await;
        drop(turn);
        // Whoever asked may have left.
        let _ = tell.send(made.map(|made| (made, not_audited)));
    });
    let (made, not_audited) = told.await.map_err(|error| ChangeError::Panicked(error.to_string()))??;
    Ok(Json(answer(made, not_audited)).into_response())
}

/// The answer to a change, which says so if the change is not in the audit file.
pub(super) fn answer(made: impl Serialize, not_audited: Option<String>) -> Value {
    let mut answer = serde_json::to_value(made).unwrap_or_default();
    if let (Some(answer), Some(reason)) = (answer.as_object_mut(), not_audited) {
        answer.insert("not_audited".to_owned(), reason.into());
    }
    answer
}

/// What decides in a slot, and how: what changes change.
fn standing(policies: &Policies, slot: &str) -> Value {
    let status = policies.reports().into_iter().find(|status| status.report.slot == slot);
    status.map_or(Value::Null, |status| {
        let report = status.report;
        let (policy, digest, settings) = (report.active.policy, report.active.digest, report.active.settings);
        json!({ "policy": policy, "digest": digest, "settings": settings, "on_error": report.on_error, "bypass": report.bypass })
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditQuery {
    last: Option<usize>,
}

/// The newest entries of the audit file.
pub(super) async fn list(State(admin): State<Admin>, query: Result<Query<AuditQuery>, QueryRejection>) -> Response {
    let most = match query {
        Ok(Query(AuditQuery { last })) => last.unwrap_or(ENTRIES).min(MAX_ENTRIES),
        Err(error) => {
            let message = format!("{}; the query takes last=NUMBER", error.body_text());
            return refusal(StatusCode::BAD_REQUEST, "query", &message);
        }
    };
    match tokio::task::spawn_blocking(move || admin.audit.newest(most)).await {
        Ok(Ok(entries)) => Json(json!({ "entries": entries })).into_response(),
        Ok(Err(reason)) => refusal(StatusCode::SERVICE_UNAVAILABLE, "state", &reason),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "internal", &error.to_string()),
    }
}

/// How each slot stands.
pub(crate) fn standings(policies: &Policies) -> Value {
    let slots = policies.reports().into_iter().map(|status| status.report.slot);
    slots.map(|slot| (slot.clone(), standing(policies, &slot))).collect::<serde_json::Map<_, _>>().into()
}

/// Writes down when an active policy is quarantined and when it is let out. It looks now and then: what came and went between
/// two looks is told with the number of quarantines.
pub(crate) async fn audit_quarantines(audit: Audit, policies: Arc<Policies>) {
    let mut seen = HashMap::<_, (u64, bool)>::new();
    loop {
        tokio::time::sleep(QUARANTINES_EVERY).await;
        let mut now = HashMap::new();
        let slots = policies.reports().into_iter().map(|status| status.report);
        // Those that were active before, too: one that is rolled back to must not look new.
        let versions = slots.flat_map(|SlotReport { slot, active, previous, .. }| {
            std::iter::once(active).chain(previous).map(move |version| (slot.clone(), version))
        });
        for (slot, active) in versions {
            let settings = active.settings.as_ref().map(Value::to_string);
            let version = (slot.clone(), active.policy.clone(), active.digest.clone(), settings);
            let (times, was_in) = seen.remove(&version).unwrap_or_default();
            let is_in = active.quarantine.is_some();
            if active.quarantines > times || is_in != was_in {
                let what = if is_in { "quarantine entered" } else { "quarantine left" };
                let mut entry = Entry::new(what, Who::Host, Some(slot));
                entry.from = json!({ "quarantined": was_in, "quarantines": times });
                entry.to = json!({ "quarantined": is_in, "quarantines": active.quarantines, "policy": active.policy,
                    "digest": active.digest, "cause": active.quarantine.map(|quarantine| quarantine.cause),
                    "last_fault": active.last_fault });
                audit.append(entry).await;
            }
            now.insert(version, (active.quarantines, is_in));
        }
        seen = now;
    }
}
