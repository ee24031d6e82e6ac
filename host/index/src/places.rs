//! A worker's engine hashes, and the place in the index of each.
//!
//! Entries lie in a list, in the order in which they came, so that those of one event are neighbours. A hash table leads to them: buckets of
//! one cache line, with twelve tags of a byte and twelve numbers of entries. It is small, and an event that stores or
//! removes a hundred blocks reads a hundred lines of it and few of the list. A number lies in the bucket of its hash, or
//! behind it where that was full; a bucket counts those that were passed on, so that a miss ends at the first bucket
//! that passed on none, or where it began. Nothing is moved but by growing.

/// Where a block lies in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) run: u32,
    pub(crate) offset: u16,
}

#[derive(Clone, Copy)]
struct Entry {
    /// The engine's hash; of an unused entry, the number of the next.
    key: u64,
    /// [`NONE`] if it is unused.
    place: Place,
}

/// No number, of a run or an entry: there are never so many.
const NONE: u32 = u32::MAX;

const SLOTS: usize = 12;

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket {
    /// 0 where there is none.
    tags: [u8; SLOTS],
    numbers: [u32; SLOTS],
    /// Entries that belong here or before, and lie behind.
    passed_on: u32,
}

const EMPTY: Bucket = Bucket { tags: [0; SLOTS], numbers: [NONE; SLOTS], passed_on: 0 };

/// Per cent of the buckets' room that is taken at most.
const FULL: usize = 60;

pub(crate) struct Places {
    buckets: Box<[Bucket]>,
    entries: Vec<Entry>,
    /// The first of the unused entries.
    unused: u32,
    len: usize,
}

impl Default for Places {
    fn default() -> Self {
        Self { buckets: Box::default(), entries: Vec::new(), unused: NONE, len: 0 }
    }
}

/// Where an entry is, and what leads there.
#[derive(Clone, Copy)]
struct Spot {
    home: usize,
    bucket: usize,
    slot: usize,
    number: u32,
}

impl Places {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.buckets) + self.entries.capacity() * size_of::<Entry>()
    }

    pub(crate) fn get(&self, key: u64) -> Option<Place> {
        self.find(key).map(|spot| self.entries[spot.number as usize].place)
    }

    /// Reads where the keys would lie, so that what follows finds them in the processor's cache: the reads overlap.
    pub(crate) fn warm(&self, keys: impl Iterator<Item = u64>) {
        if !self.buckets.is_empty() {
            let sum = keys.fold(0, |sum: u32, key| sum ^ self.buckets[self.home(spread(key))].passed_on);
            std::hint::black_box(sum);
        }
    }

    /// Makes room for so many more.
    pub(crate) fn reserve(&mut self, more: usize) {
        let needed = self.len + more;
        let buckets = needed * 100 / FULL / SLOTS + 1;
        if buckets > self.buckets.len() {
            self.resize(buckets.max(self.buckets.len() * 3 / 2));
        }
        if needed > self.entries.capacity() {
            let room = needed.max(self.entries.capacity() * 5 / 4);
            self.entries.reserve_exact(room - self.entries.len());
        }
    }

    /// The place that the key had before.
    pub(crate) fn insert(&mut self, key: u64, place: Place) -> Option<Place> {
        if let Some(spot) = self.find(key) {
            return Some(std::mem::replace(&mut self.entries[spot.number as usize].place, place));
        }
        self.reserve(1);
        let entry = Entry { key, place };
        let number = match self.entries.get_mut(self.unused as usize) {
            Some(unused) => {
                let next = unused.key as u32;
                *unused = entry;
                std::mem::replace(&mut self.unused, next)
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        };
        self.lead_to(number, key);
        self.len += 1;
        None
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<Place> {
        let Spot { home, bucket, slot, number } = self.find(key)?;
        self.buckets[bucket].tags[slot] = 0;
        let mut passed = home;
        while passed != bucket {
            self.buckets[passed].passed_on -= 1;
            passed = self.next(passed);
        }
        let unused = Entry { key: self.unused.into(), place: Place { run: NONE, offset: 0 } };
        let entry = std::mem::replace(&mut self.entries[number as usize], unused);
        self.unused = number;
        self.len -= 1;
        Some(entry.place)
    }

    /// Gives memory back when little of it is used.
    pub(crate) fn shrink(&mut self) {
        if self.len == 0 {
            *self = Self::default();
        } else if self.buckets.len() > 16 && self.len * 300 < self.buckets.len() * SLOTS * FULL {
            self.entries.retain(Entry::is_used);
            self.entries.shrink_to(self.len * 5 / 4);
            self.unused = NONE;
            self.resize(self.len * 150 / FULL / SLOTS + 1);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Place)> {
        self.entries.iter().filter(|entry| entry.is_used()).map(|entry| (entry.key, entry.place))
    }

    fn find(&self, key: u64) -> Option<Spot> {
        if self.buckets.is_empty() {
            return None;
        }
        let spread = spread(key);
        let (home, tag) = (self.home(spread), tag(spread));
        let mut bucket = home;
        loop {
            let Bucket { tags, numbers, passed_on } = &self.buckets[bucket];
            let mut alike = slots_with(tags, tag);
            while alike != 0 {
                let slot = alike.trailing_zeros() as usize / 8;
                let number = numbers[slot];
                if tags[slot] == tag && self.entries[number as usize].key == key {
                    return Some(Spot { home, bucket, slot, number });
                }
                alike &= alike - 1;
            }
            if *passed_on == 0 {
                return None;
            }
            bucket = self.next(bucket);
            // Each of a small table's buckets may have passed some on.
            if bucket == home {
                return None;
            }
        }
    }

    /// Has the table lead to an entry that it does not lead to yet; some bucket has room.
    fn lead_to(&mut self, number: u32, key: u64) {
        let spread = spread(key);
        let mut at = self.home(spread);
        loop {
            let bucket = &mut self.buckets[at];
            // The lowest one that is found is right, always.
            let slot = slots_with(&bucket.tags, 0).trailing_zeros() as usize / 8;
            if slot < SLOTS {
                bucket.tags[slot] = tag(spread);
                bucket.numbers[slot] = number;
                return;
            }
            bucket.passed_on += 1;
            at = self.next(at);
        }
    }

    fn home(&self, spread: u64) -> usize {
        ((u128::from(spread) * self.buckets.len() as u128) >> 64) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    fn resize(&mut self, buckets: usize) {
        self.buckets = vec![EMPTY; buckets].into();
        for number in 0..self.entries.len() {
            let entry = self.entries[number];
            if entry.is_used() {
                self.lead_to(number as u32, entry.key);
            }
        }
    }
}

impl Entry {
    fn is_used(&self) -> bool {
        self.place.run != NONE
    }
}

/// A bit in the byte of each slot with this tag, and perhaps in some behind the first: all twelve in one comparison.
fn slots_with(tags: &[u8; SLOTS], tag: u8) -> u128 {
    const ONES: u128 = (u128::MAX / 0xff) >> 32;
    let mut bytes = [0; 16];
    bytes[..SLOTS].copy_from_slice(tags);
    let other = u128::from_le_bytes(bytes) ^ (ONES * tag as u128);
    other.wrapping_sub(ONES) & !other & (ONES << 7)
}

/// Of the bits that do not choose the bucket; never 0.
fn tag(spread: u64) -> u8 {
    (spread as u8).max(1)
}

/// Spreads engines' hashes, of which nothing is known, over all 64 bits; each has its own.
fn spread(key: u64) -> u64 {
    let key = (key ^ (key >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key ^ (key >> 29)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map(operations in proptest::collection::vec((0..3_u8, 0..300_u64), 0..2_000), stride in 1..u64::MAX) {
            let (mut places, mut model) = (Places::default(), HashMap::new());
            for (nth, (what, key)) in operations.into_iter().enumerate() {
                let key = key.wrapping_mul(stride);
                let place = Place { run: nth as u32, offset: 1 };
                match what {
                    0 | 1 => {
                        places.reserve(usize::from(what));
                        prop_assert_eq!(places.insert(key, place), model.insert(key, place));
                    }
                    _ => {
                        prop_assert_eq!(places.remove(key), model.remove(&key));
                        places.shrink();
                    }
                }
                prop_assert_eq!(places.len(), model.len());
            }
            for key in (0..300_u64).map(|key| key.wrapping_mul(stride)) {
                prop_assert_eq!(places.get(key), model.get(&key).copied());
            }
            prop_assert_eq!(places.iter().collect::<HashMap<_, _>>(), model);
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map_of_few_keys(operations in proptest::collection::vec((any::<bool>(), 0..20_u64), 0..2_000), stride in 1..u64::MAX) {
            let (mut places, mut model) = (Places::default(), HashMap::new());
            for (nth, (is_insert, key)) in operations.into_iter().enumerate() {
                let key = key.wrapping_mul(stride);
                let place = Place { run: nth as u32, offset: 1 };
                match is_insert {
                    true => prop_assert_eq!(places.insert(key, place), model.insert(key, place)),
                    false => prop_assert_eq!(places.remove(key), model.remove(&key)),
                }
                prop_assert_eq!(places.get(key), model.get(&key).copied());
            }
            prop_assert_eq!(places.iter().collect::<HashMap<_, _>>(), model);
        }
    }

    #[test]
    fn a_key_that_is_not_there_is_missed_though_every_bucket_passed_some_on() {
        let mut places = Places::default();
        places.reserve(14);
        assert_eq!(places.buckets.len(), 2);
        let of_home = |home: usize| (0_u64..).filter(|key| places.home(spread(*key)) == home).take(14).collect::<Vec<_>>();
        let (first, second) = (of_home(0), of_home(1));
        let place = Place { run: 1, offset: 0 };
        for key in &first[..13] {
            places.insert(*key, place);
        }
        for key in &first[..11] {
            places.remove(*key);
        }
        for key in &second[..12] {
            places.insert(*key, place);
        }
        assert!(places.buckets.len() == 2 && places.buckets.iter().all(|bucket| bucket.passed_on > 0));
        assert_eq!((places.get(first[13]), places.get(second[13]), places.remove(first[0])), (None, None, None));
        assert!(second[..12].iter().chain(&first[11..13]).all(|key| places.get(*key) == Some(place)));
    }

    #[test]
    fn an_entry_costs_at_most_44_bytes_and_an_empty_table_none() {
        let mut places = Places::default();
        for key in 0..100_000 {
            places.reserve(1);
            places.insert(key, Place { run: 1, offset: 0 });
            assert!(key < 2_000 || places.bytes() <= 44 * places.len(), "{} bytes for {} entries", places.bytes(), places.len());
        }
        for key in 0..100_000 {
            places.remove(key);
            places.shrink();
        }
        assert_eq!((places.len(), places.bytes()), (0, 0));
    }
}
