//! A worker's engine hashes, and the place in the index of each.
//!
//! A hash table in buckets of four entries, one bucket to a cache line. An entry lies in the bucket of its hash, or behind it where that was
//! full; a bucket counts those that were passed on, so that a miss ends at the first bucket that passed on none. Nothing is ever
//! moved but by growing, which goes by half: 40 to 60 % of the room is taken, 32 bytes an entry on average. (Fuller open addressing costs 20
//! bytes, and twice the time of an event: it shifts entries.)

/// Where a block lies in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) run: u32,
    pub(crate) offset: u16,
}

const SLOTS: usize = 4;

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket {
    keys: [u64; SLOTS],
    /// [`NONE`] where there is no entry.
    runs: [u32; SLOTS],
    offsets: [u16; SLOTS],
    /// Entries that belong here or before, and lie behind.
    passed_on: u32,
}

/// No run's number: there are never so many.
const NONE: u32 = u32::MAX;

const EMPTY: Bucket = Bucket { keys: [0; SLOTS], runs: [NONE; SLOTS], offsets: [0; SLOTS], passed_on: 0 };

/// Per cent of the room that is taken at most.
const FULL: usize = 60;

#[derive(Default)]
pub(crate) struct Places {
    buckets: Box<[Bucket]>,
    len: usize,
}

impl Places {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }

    pub(crate) fn get(&self, key: u64) -> Option<Place> {
        let (bucket, slot) = self.find(key)?;
        Some(self.buckets[bucket].place(slot))
    }

    /// Reads where the keys would lie, so that what follows finds them in the processor's cache: the reads overlap.
    pub(crate) fn warm(&self, keys: impl Iterator<Item = u64>) {
        if !self.buckets.is_empty() {
            let sum = keys.fold(0, |sum: u64, key| sum ^ self.buckets[self.home(key)].keys[0]);
            std::hint::black_box(sum);
        }
    }

    /// Makes room for so many more.
    pub(crate) fn reserve(&mut self, more: usize) {
        let room = (self.len + more) * 100 / FULL / SLOTS + 1;
        if room > self.buckets.len() {
            self.resize(room.max(self.buckets.len() * 3 / 2));
        }
    }

    /// The place that the key had before.
    pub(crate) fn insert(&mut self, key: u64, place: Place) -> Option<Place> {
        if let Some((bucket, slot)) = self.find(key) {
            let before = self.buckets[bucket].place(slot);
            self.buckets[bucket].set(slot, key, place);
            return Some(before);
        }
        self.reserve(1);
        self.put(key, place);
        self.len += 1;
        None
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<Place> {
        let (bucket, slot) = self.find(key)?;
        let place = self.buckets[bucket].place(slot);
        self.buckets[bucket].runs[slot] = NONE;
        let mut passed = self.home(key);
        while passed != bucket {
            self.buckets[passed].passed_on -= 1;
            passed = self.next(passed);
        }
        self.len -= 1;
        Some(place)
    }

    /// Gives memory back when little of it is used.
    pub(crate) fn shrink(&mut self) {
        if self.len == 0 {
            *self = Self::default();
        } else if self.buckets.len() > 16 && self.len * 300 < self.buckets.len() * SLOTS * FULL {
            self.resize(self.len * 150 / FULL / SLOTS + 1);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Place)> {
        self.buckets.iter().flat_map(Bucket::entries)
    }

    fn find(&self, key: u64) -> Option<(usize, usize)> {
        if self.buckets.is_empty() {
            return None;
        }
        let mut at = self.home(key);
        loop {
            let bucket = &self.buckets[at];
            if let Some(slot) = bucket.find(key) {
                return Some((at, slot));
            }
            if bucket.passed_on == 0 {
                return None;
            }
            at = self.next(at);
        }
    }

    /// Puts a key that is not there; some bucket has room.
    fn put(&mut self, key: u64, place: Place) {
        let mut at = self.home(key);
        loop {
            if let Some(slot) = self.buckets[at].free() {
                return self.buckets[at].set(slot, key, place);
            }
            self.buckets[at].passed_on += 1;
            at = self.next(at);
        }
    }

    fn home(&self, key: u64) -> usize {
        ((u128::from(spread(key)) * self.buckets.len() as u128) >> 64) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    fn resize(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![EMPTY; buckets].into());
        for (key, place) in old.iter().flat_map(Bucket::entries) {
            self.put(key, place);
        }
    }
}

impl Bucket {
    /// Without branches but the last: which slot it is cannot be guessed.
    fn find(&self, key: u64) -> Option<usize> {
        let matches = (0..SLOTS).fold(0, |all, at| all | u32::from(self.keys[at] == key && self.runs[at] != NONE) << at);
        (matches != 0).then(|| matches.trailing_zeros() as usize)
    }

    fn free(&self) -> Option<usize> {
        let free = (0..SLOTS).fold(0, |all, at| all | u32::from(self.runs[at] == NONE) << at);
        (free != 0).then(|| free.trailing_zeros() as usize)
    }

    fn place(&self, slot: usize) -> Place {
        Place { run: self.runs[slot], offset: self.offsets[slot] }
    }

    fn set(&mut self, slot: usize, key: u64, place: Place) {
        self.keys[slot] = key;
        self.runs[slot] = place.run;
        self.offsets[slot] = place.offset;
    }

    fn entries(&self) -> impl Iterator<Item = (u64, Place)> {
        (0..SLOTS).filter(|slot| self.runs[*slot] != NONE).map(|slot| (self.keys[slot], self.place(slot)))
    }
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
