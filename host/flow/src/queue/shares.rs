//! Shares: who is next in a pool, and who has most of the queue.
//!
//! A tree per pool: its tiers in strict order, below each tier its classes and below each class its tenants by weight, and
//! below a tenant its waiting requests by rank. All nodes live in one arena, of one kind.
//!
//! **Who is next.** Start-time fair queueing (Goyal, Vin, Cheng 1996) at each of the two fair levels. A child's *start* is the
//! virtual time from which its next request is served: when a request of `work` tokens starts, its child's start moves on by
//! `work / weight`, and the parent's virtual time is the latest start that was served. The least start is next. A child
//! that had nothing waiting begins at the parent's virtual time: it brings no credit, and is not charged for its absence.
//!
//! What a request turns out to be is settled at its end. The difference moves the child's start to where it would be, had it
//! been known, but never before the virtual time at which the child came (`floor`) and what was served to it since: a refund
//! for what was started before that is no credit either.
//!
//! Invariants: a child is in its parent's `order` and `fattest` exactly while something waits below it; in its parent's `idle`
//! only while nothing waits or runs below it, and then nothing is below it at all. An idle child whose start the virtual
//! time has passed is as good as a new one, and forgotten; of the others a parent keeps [`MAX_IDLE`], and moves its time on
//! beyond them, so that an endless row of new tenants neither fills the memory nor keeps those that were there from
//! being served.

mod audit;

use std::collections::{BTreeSet, HashMap};

pub(super) use self::audit::ShareTotals;

/// Place in an order: the least is first.
pub(super) type Rank = [u64; 3];

/// A node's place in the arena.
pub(super) type NodeId = u32;

/// Idle children whose last work is not made up for yet that a node remembers.
const MAX_IDLE: usize = 64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Level {
    #[default]
    Pool,
    Tier,
    Class,
    Tenant,
}

/// Where a request belongs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    pub(super) tier: u32,
    pub(super) class: u64,
    pub(super) class_weight: f32,
    pub(super) tenant: u64,
    pub(super) tenant_weight: f32,
}

/// What a waiting request is to its tenant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) slot: u32,
    pub(super) rank: Rank,
    /// When it came among all requests.
    pub(super) number: u64,
    pub(super) work: u32,
    /// What it takes of the queue.
    pub(super) part: u64,
}

#[derive(Debug, Default)]
struct Node {
    level: Level,
    parent: NodeId,
    key: u64,
    weight: f64,
    /// Start as its whole history has it.
    tag: f64,
    /// Start as its history since it came last has it.
    floor: f64,
    /// The request that it came with.
    since: u64,
    /// Virtual time of its children.
    now: f64,
    waiting: u32,
    running: u32,
    /// Work of what waits.
    work: u64,
    /// What those that wait take of the queue.
    part: u64,
    /// Weights of the children with something waiting.
    weights: f64,
    /// Children with something waiting, or a tenant's requests: the first is next.
    order: BTreeSet<(Rank, u32)>,
    /// Children with something waiting by what they have of the queue for their weight.
    fattest: BTreeSet<(u64, NodeId)>,
    /// Children with nothing waiting or running that are ahead of the virtual time.
    idle: BTreeSet<(u64, NodeId)>,
}

#[derive(Clone, Copy, PartialEq)]
struct Places {
    rank: Rank,
    fatness: u64,
    weight: f64,
}

impl Node {
    fn start(&self) -> f64 {
        self.tag.max(self.floor).max(0.0)
    }

    fn rank(&self) -> Rank {
        match self.level {
            Level::Tier => [self.key, 0, 0],
            _ => [self.start().to_bits(), self.since, 0],
        }
    }

    /// What it has of the queue for its weight, `more` added and `less` taken away.
    fn fatness(&self, more: u64, less: u64) -> u64 {
        ((self.part + more).saturating_sub(less) as f64 / self.weight).to_bits()
    }

    fn is_busy(&self) -> bool {
        self.waiting + self.running > 0
    }

    /// Whether its share is counted in virtual time.
    fn is_fair(&self) -> bool {
        matches!(self.level, Level::Class | Level::Tenant)
    }

    /// Its places among its siblings; none if nothing waits.
    fn places(&self) -> Option<Places> {
        (self.waiting > 0).then(|| Places { rank: self.rank(), fatness: self.fatness(0, 0), weight: self.weight })
    }

    fn charge(&mut self, work: f64, number: u64) {
        let cost = work / self.weight;
        self.tag += cost;
        if number >= self.since {
            self.floor += cost;
        }
    }
}

/// The trees of all pools.
#[derive(Debug, Default)]
pub(super) struct Shares {
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    children: HashMap<(NodeId, u64), NodeId>,
    /// Pools' tiers with something waiting, by what they have of the queue.
    tiers: BTreeSet<(u64, u64, NodeId)>,
}

impl Shares {
    /// The root of a pool's tree.
    pub(super) fn add_pool(&mut self) -> NodeId {
        self.create(Node { level: Level::Pool, weight: 1.0, ..Node::default() })
    }

    /// Drops a pool's tree, which has nothing waiting or running.
    pub(super) fn remove_pool(&mut self, root: NodeId) {
        self.free.push(root);
    }

    /// The tenant's node for a request; it is there until [`release`](Self::release) finds that nothing is left of it.
    pub(super) fn tenant(&mut self, root: NodeId, standing: &Standing) -> NodeId {
        let tier = self.child(root, Level::Tier, standing.tier.into(), 1.0);
        let class = self.child(tier, Level::Class, standing.class, standing.class_weight);
        self.child(class, Level::Tenant, standing.tenant, standing.tenant_weight)
    }

    fn child(&mut self, parent: NodeId, level: Level, key: u64, weight: f32) -> NodeId {
        let weight = f64::from(weight);
        let Some(&id) = self.children.get(&(parent, key)) else {
            let id = self.create(Node { level, parent, key, weight, ..Node::default() });
            self.children.insert((parent, key), id);
            return id;
        };
        self.change(id, |node| node.weight = weight);
        id
    }

    fn create(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.free.pop() {
            // Its order is empty, and keeps its memory.
            let order = std::mem::take(&mut self.nodes[id as usize].order);
            self.nodes[id as usize] = Node { order, ..node };
            return id;
        }
        self.nodes.push(node);
        (self.nodes.len() - 1) as NodeId
    }

    /// Nodes from a tenant's up to the pool's.
    fn path(&self, tenant: NodeId) -> [NodeId; 4] {
        let class = self.nodes[tenant as usize].parent;
        let tier = self.nodes[class as usize].parent;
        [tenant, class, tier, self.nodes[tier as usize].parent]
    }

    /// A request waits.
    pub(super) fn push(&mut self, tenant: NodeId, item: &Item) {
        self.nodes[tenant as usize].order.insert((item.rank, item.slot));
        for id in self.path(tenant) {
            self.come(id, item.number);
            self.change(id, |node| {
                node.waiting += 1;
                node.work += u64::from(item.work);
                node.part += item.part;
            });
        }
    }

    /// It waits no more.
    pub(super) fn pop(&mut self, tenant: NodeId, item: &Item) {
        self.nodes[tenant as usize].order.remove(&(item.rank, item.slot));
        for id in self.path(tenant) {
            self.change(id, |node| {
                node.waiting -= 1;
                node.work -= u64::from(item.work);
                node.part -= item.part;
            });
        }
    }

    /// A request starts: its work is charged. It is popped after that, if it waited.
    pub(super) fn start(&mut self, tenant: NodeId, number: u64, work: u32) {
        for id in self.path(tenant) {
            self.come(id, number);
            let Node { parent, .. } = self.nodes[id as usize];
            if self.nodes[id as usize].is_fair() {
                self.pass(parent, self.nodes[id as usize].start());
            }
            self.change(id, |node| {
                node.running += 1;
                node.charge(work.into(), number);
            });
        }
    }

    /// A request that started has ended, and was `work` where `charged` was charged.
    pub(super) fn end(&mut self, tenant: NodeId, number: u64, charged: u32, work: u32) {
        for id in self.path(tenant) {
            self.change(id, |node| {
                node.running -= 1;
                node.charge(f64::from(work) - f64::from(charged), number);
            });
        }
    }

    /// A child that has nothing waiting comes, at its parent's virtual time.
    fn come(&mut self, id: NodeId, number: u64) {
        let node = &self.nodes[id as usize];
        if node.waiting > 0 || !node.is_fair() {
            return;
        }
        let (start, parent, was_idle) = (node.start(), node.parent, !node.is_busy());
        let siblings = &mut self.nodes[parent as usize];
        let floor = siblings.now;
        if was_idle {
            siblings.idle.remove(&(start.to_bits(), id));
        }
        let node = &mut self.nodes[id as usize];
        (node.tag, node.floor, node.since) = (start, floor, number);
    }

    /// Changes a node, and its places among its siblings with it.
    fn change(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) {
        let node = &mut self.nodes[id as usize];
        let before = node.places();
        change(node);
        let after = node.places();
        let (level, tier, parent) = (node.level, node.key, node.parent);
        if before == after || level == Level::Pool {
            return;
        }
        let siblings = &mut self.nodes[parent as usize];
        if before.map(|places| places.rank) != after.map(|places| places.rank) {
            before.map(|places| siblings.order.remove(&(places.rank, id)));
            after.map(|places| siblings.order.insert((places.rank, id)));
        }
        siblings.weights += after.map_or(0.0, |places| places.weight) - before.map_or(0.0, |places| places.weight);
        if siblings.order.is_empty() {
            siblings.weights = 0.0;
        }
        let [before, after] = [before, after].map(|places| places.map(|places| places.fatness));
        if before == after {
            return;
        }
        if level == Level::Tier {
            before.map(|fatness| self.tiers.remove(&(tier, fatness, id)));
            after.map(|fatness| self.tiers.insert((tier, fatness, id)));
        } else {
            before.map(|fatness| siblings.fattest.remove(&(fatness, id)));
            after.map(|fatness| siblings.fattest.insert((fatness, id)));
        }
    }

    /// Moves a parent's virtual time on, and forgets the idle children that it has passed.
    fn pass(&mut self, parent: NodeId, time: f64) {
        let node = &mut self.nodes[parent as usize];
        node.now = node.now.max(time);
        while let Some(&(start, child)) = self.nodes[parent as usize].idle.first()
            && f64::from_bits(start) <= self.nodes[parent as usize].now
        {
            self.nodes[parent as usize].idle.remove(&(start, child));
            self.forget(child);
        }
    }

    /// Forgets what has nothing waiting or running any more, from a tenant up.
    pub(super) fn release(&mut self, tenant: NodeId) {
        for id in self.path(tenant) {
            let node = &mut self.nodes[id as usize];
            if node.is_busy() || node.level == Level::Pool {
                return;
            }
            // Nobody is left to compete below it: there it begins anew.
            node.now = 0.0;
            let (start, parent, is_fair) = (node.start(), node.parent, node.is_fair());
            for (_, child) in std::mem::take(&mut node.idle) {
                self.forget(child);
            }
            if !is_fair || start <= self.nodes[parent as usize].now {
                self.forget(id);
                continue;
            }
            let idle = &mut self.nodes[parent as usize].idle;
            idle.insert((start.to_bits(), id));
            if idle.len() > MAX_IDLE
                && let Some(&(least, _)) = idle.first()
            {
                self.pass(parent, f64::from_bits(least));
            }
        }
    }

    fn forget(&mut self, id: NodeId) {
        let Node { parent, key, .. } = self.nodes[id as usize];
        self.children.remove(&(parent, key));
        self.free.push(id);
    }

    /// The request that is next in a pool.
    pub(super) fn next(&self, root: NodeId) -> Option<u32> {
        let first = |id: u32| self.nodes[id as usize].order.first().map(|&(_, child)| child);
        first(root).and_then(first).and_then(first).and_then(first)
    }

    /// The request that has the least claim to its place in the queue: the last one of the tenant that has most of it for
    /// its weight, in the class, the pool and the last tier of which that holds too.
    pub(super) fn worst(&self) -> Option<u32> {
        let tier = self.tiers.last()?.2;
        self.nodes[self.fattest_tenant(tier) as usize].order.last().map(|&(_, slot)| slot)
    }

    fn fattest_tenant(&self, tier: NodeId) -> NodeId {
        let fattest = |id: NodeId| self.nodes[id as usize].fattest.last().map_or(id, |&(_, child)| child);
        fattest(fattest(tier))
    }

    /// Requests of the same tier whose places an arrival with this item may take, the first to go first: those of whoever
    /// has most of the queue for its weight, as long as that still has no less than the arrival's own then has.
    /// `within`: looked for in all pools (0), in the arrival's own (1), or in its own class there (2). `least_part`: what they
    /// have of the queue at least, all that have to go. `None`: there are none such.
    pub(super) fn yielding(&self, tenant: NodeId, item: &Item, within: usize, least_part: u64) -> Option<Yielding<'_>> {
        let [_, class, tier, _] = self.path(tenant);
        let key = self.nodes[tier as usize].key;
        let fattest_tier = self.tiers.range((key, 0, 0)..=(key, u64::MAX, NodeId::MAX)).next_back();
        let mut pair = (fattest_tier.map_or(tier, |&(.., id)| id), tier);
        for (level, own) in [class, tenant].into_iter().enumerate() {
            if pair.0 == pair.1 || level < within {
                pair = (self.nodes[pair.1 as usize].fattest.last().map_or(own, |&(_, id)| id), own);
            }
        }
        let (other, own) = pair;
        let (other_node, own_node) = (&self.nodes[other as usize], &self.nodes[own as usize]);
        let limit = if other == own { Limit::Rank(item.rank) } else { Limit::Fatness(own_node.fatness(item.part, 0)) };
        // What cannot be is not searched for.
        let is_hopeless = matches!(limit, Limit::Fatness(own) if other_node.fatness(0, least_part) < own);
        (!is_hopeless).then(|| Yielding { other: other_node, items: self.last_first(other), limit, gone: 0 })
    }

    /// Requests below a node: of whoever has most of the queue for its weight, the last first; then of who has most beside.
    fn last_first(&self, id: NodeId) -> Box<dyn Iterator<Item = (Rank, u32)> + '_> {
        let node = &self.nodes[id as usize];
        match node.level {
            Level::Tenant => Box::new(node.order.iter().rev().copied()),
            _ => Box::new(node.fattest.iter().rev().flat_map(|&(_, child)| self.last_first(child))),
        }
    }

    /// Work that is served before a newcomer of this standing, as shares are now.
    pub(super) fn before(&self, root: NodeId, standing: &Standing) -> f64 {
        let tiers = self.nodes[root as usize].order.iter();
        let sooner = tiers.clone().take_while(|(rank, _)| rank[0] < u64::from(standing.tier));
        let sooner: u64 = sooner.map(|&(_, id)| self.nodes[id as usize].work).sum();
        let find = |parent: Option<NodeId>, key| self.children.get(&(parent?, key)).copied();
        let tier = find(Some(root), standing.tier.into());
        let class = find(tier, standing.class);
        let tenant = find(class, standing.tenant);
        // While its own are served, the others of its level are by their weights; no more than they have.
        let own = tenant.map_or(0, |id| self.nodes[id as usize].work) as f64;
        let in_class = self.scaled(class, own, standing.tenant_weight);
        let in_tier = self.scaled(tier, in_class, standing.class_weight);
        sooner as f64 + in_tier
    }

    fn scaled(&self, parent: Option<NodeId>, work: f64, weight: f32) -> f64 {
        let Some(node) = parent.map(|id| &self.nodes[id as usize]) else { return work };
        (work * node.weights / f64::from(weight)).max(work).min(node.work as f64)
    }
}

/// Requests that yield their places.
pub(super) struct Yielding<'a> {
    other: &'a Node,
    items: Box<dyn Iterator<Item = (Rank, u32)> + 'a>,
    limit: Limit,
    gone: u64,
}

enum Limit {
    /// Those of the same tenant that come after it.
    Rank(Rank),
    /// Those of others, while they have no less than this.
    Fatness(u64),
}

impl Yielding<'_> {
    /// The next one, whose part of the queue the caller tells.
    pub(super) fn next(&mut self, part: impl FnOnce(u32) -> u64) -> Option<u32> {
        let (rank, slot) = self.items.next()?;
        self.gone += part(slot);
        let yields = match self.limit {
            Limit::Rank(own) => rank > own,
            Limit::Fatness(own) => self.other.fatness(0, self.gone) >= own,
        };
        yields.then_some(slot)
    }
}
