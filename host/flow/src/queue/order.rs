//! Where a request stands among others: its place in the shares, and its rank among its tenant's own.

use dynamo_host_core::{Admitted, admission::TIERS, id};

use super::shares::Standing;

pub(super) fn standing(admitted: &Admitted, tenant: u64) -> Standing {
    Standing {
        tier: admitted.tier.min(TIERS - 1),
        class: admitted.class.as_deref().map_or(0, |class| id::key(class.as_bytes())),
        class_weight: admitted.class_weight,
        tenant,
        tenant_weight: admitted.tenant_weight,
    }
}

/// A rank by which higher priorities come first; what is no number is no priority.
pub(super) fn sooner_first(priority: f32) -> u64 {
    // Without the sign of 0; and in the order of their bits, as IEEE 754 has it.
    let bits = if priority.is_nan() { 0.0f32 } else { priority + 0.0 }.to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending)
}
