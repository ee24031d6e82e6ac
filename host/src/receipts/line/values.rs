//! Values of receipts: identities, and columns as lists of cells.
//!
//! Contract: a column comes back bit by bit. Its type is told by its name, as the contract with policies has it.

use std::fmt;

use dynamo_host_core::{
    Column, UNKNOWN,
    column::{F32Column, LinkColumn, U64Column},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// An identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hex(pub(crate) u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Self).map_err(|_| D::Error::custom(format!("{text:?} is not hexadecimal")))
    }
}

/// One value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Cell {
    Amount(u32),
    Measure(f32),
    Key(Hex),
    Unknown(()),
}

/// One value per row, or one for all of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Values<T> {
    Each(Vec<T>),
    All(T),
}

impl<T: Clone + PartialEq> Values<T> {
    pub(super) fn of(values: Vec<T>) -> Self {
        match values.split_first() {
            Some((first, rest)) if !rest.is_empty() && rest.iter().all(|value| value == first) => Self::All(first.clone()),
            _ => Self::Each(values),
        }
    }

    /// The value in a row.
    pub(crate) fn get(&self, row: usize) -> Option<&T> {
        match self {
            Self::Each(values) => values.get(row),
            Self::All(value) => Some(value),
        }
    }

    /// The values in some rows.
    pub(super) fn only(&self, rows: &[usize]) -> Self {
        match self {
            Self::Each(values) => Self::of(rows.iter().filter_map(|&row| values.get(row).cloned()).collect()),
            Self::All(value) => Self::All(value.clone()),
        }
    }

    fn each(&self, rows: usize) -> Vec<T> {
        match self {
            Self::Each(values) => values.clone(),
            Self::All(value) => vec![value.clone(); rows],
        }
    }
}

/// The values of some rows of a column.
pub(super) fn values(column: &Column, rows: &[u32]) -> Values<Cell> {
    let cell = |&row: &u32| match column {
        Column::U64(values) => Cell::Key(Hex(values[row as usize])),
        Column::U32(values) => match values[row as usize] {
            UNKNOWN => Cell::Unknown(()),
            amount => Cell::Amount(amount),
        },
        Column::F32(values) => measure(values[row as usize]).map_or(Cell::Unknown(()), Cell::Measure),
    };
    Values::of(rows.iter().map(cell).collect())
}

/// A number that JSON has.
pub(super) fn measure(value: f32) -> Option<f32> {
    Some(value).filter(|value| value.is_finite())
}

/// The column of this name with these values.
///
/// # Errors
/// If it cannot hold them.
pub(super) fn column(name: &str, values: &Values<Cell>, rows: usize) -> Result<Column, String> {
    if U64Column::ALL.iter().any(|(of, _)| *of == name) {
        let key = |cell| if let Cell::Key(key) = cell { Ok(key.0) } else { Err(wrong(name, cell)) };
        return Ok(Column::U64(values.each(rows).into_iter().map(key).collect::<Result<_, _>>()?));
    }
    if F32Column::ALL.iter().any(|(of, _)| *of == name) { measures(name, values, rows) } else { amounts(name, values, rows) }
}

/// The column of links of this name with these values.
///
/// # Errors
/// If it cannot hold them.
pub(super) fn link_column(name: &str, values: &Values<Cell>, rows: usize) -> Result<Column, String> {
    if LinkColumn::ALL.iter().any(|(of, _)| *of == name) { measures(name, values, rows) } else { amounts(name, values, rows) }
}

fn measures(name: &str, values: &Values<Cell>, rows: usize) -> Result<Column, String> {
    let measure = |cell| match cell {
        Cell::Amount(value) => Ok(value as f32),
        Cell::Measure(value) => Ok(value),
        Cell::Unknown(()) => Ok(f32::NAN),
        Cell::Key(_) => Err(wrong(name, cell)),
    };
    Ok(Column::F32(values.each(rows).into_iter().map(measure).collect::<Result<_, _>>()?))
}

fn amounts(name: &str, values: &Values<Cell>, rows: usize) -> Result<Column, String> {
    let amount = |cell| match cell {
        Cell::Amount(value) => Ok(value),
        Cell::Unknown(()) => Ok(UNKNOWN),
        Cell::Measure(_) | Cell::Key(_) => Err(wrong(name, cell)),
    };
    Ok(Column::U32(values.each(rows).into_iter().map(amount).collect::<Result<_, _>>()?))
}

fn wrong(name: &str, cell: Cell) -> String {
    format!("its column {name} holds {cell:?}")
}
