//! The books of the trees, checked against what is below each node: for [`Flow::audit`](super::super::Flow::audit).

use std::collections::BTreeSet;

use super::{Level, MAX_IDLE, NodeId, Shares};

/// What is below a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::queue) struct ShareTotals {
    pub(in crate::queue) waiting: u32,
    pub(in crate::queue) running: u32,
    pub(in crate::queue) work: u64,
}

impl Shares {
    /// What a node says is below it, if all there agrees with it.
    pub(in crate::queue) fn audit(&self, id: NodeId) -> Result<ShareTotals, String> {
        let node = &self.nodes[id as usize];
        let totals = ShareTotals { waiting: node.waiting, running: node.running, work: node.work };
        let wrong = |what: &str| Err(format!("{what} of {:?} {:x}: {node:?}", node.level, node.key));
        if node.level == Level::Tenant {
            return if node.order.len() == node.waiting as usize { Ok(totals) } else { wrong("waiting requests") };
        }
        let mut sum = ShareTotals::default();
        let (mut active, mut idle, mut weights) = (0, 0, 0.0);
        for (_, &child) in self.children.iter().filter(|((parent, _), _)| *parent == id) {
            let below = self.audit(child)?;
            sum = ShareTotals {
                waiting: sum.waiting + below.waiting,
                running: sum.running + below.running,
                work: sum.work + below.work,
            };
            let child_node = &self.nodes[child as usize];
            if below.waiting > 0 {
                active += 1;
                weights += child_node.weight;
                let is_fat = child_node.level == Level::Tier || node.fattest.contains(&(child_node.fatness(0, 0), child));
                if !node.order.contains(&(child_node.rank(), child)) || !is_fat {
                    return wrong("a child's place");
                }
            } else if below.running == 0 {
                idle += 1;
                if !node.idle.contains(&(child_node.start().to_bits(), child)) || child_node.start() <= node.now {
                    return wrong("an idle child");
                }
            }
        }
        let fat = if node.level == Level::Pool { 0 } else { active };
        if sum != totals || (node.order.len(), node.idle.len(), node.fattest.len()) != (active, idle, fat) || idle > MAX_IDLE {
            return wrong("the sums");
        }
        if (weights - node.weights).abs() > 1e-6 * weights.max(1.0) {
            return wrong("the weights");
        }
        Ok(totals)
    }

    /// Whether every node is a pool's, a child, or free.
    pub(in crate::queue) fn audit_arena(&self) -> Result<(), String> {
        let pools = self.nodes.len() - self.free.len() - self.children.len();
        let unique: BTreeSet<_> = self.free.iter().collect();
        let tiers = self.children.values().filter(|&&id| {
            let node = &self.nodes[id as usize];
            node.level == Level::Tier && node.waiting > 0
        });
        if unique.len() != self.free.len() || tiers.count() != self.tiers.len() {
            return Err(format!("{pools} pools, {} free nodes, {} tiers: {:?}", self.free.len(), self.tiers.len(), self.tiers));
        }
        Ok(())
    }

    /// Nodes in use.
    #[cfg(test)]
    pub(in crate::queue) fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }
}
