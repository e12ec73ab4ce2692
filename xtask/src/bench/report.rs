//! What was measured, beside its floor and its budget: as a table for people, as JSON for everything else.

use serde_json::{Value, json};

/// Repetitions of one measurement.
#[derive(Clone, Debug, Default)]
pub(super) struct Series(Vec<f64>);

impl Series {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub(super) fn extend(&mut self, other: &Self) {
        for value in &other.0 {
            self.push(*value);
        }
    }

    pub(super) fn median(&self) -> f64 {
        self.quantile(1, 2)
    }

    /// The smallest value that `part/whole` of all values do not exceed.
    fn quantile(&self, part: usize, whole: usize) -> f64 {
        let index = (self.0.len() * part).div_ceil(whole).max(1) - 1;
        self.0.get(index).copied().unwrap_or(f64::NAN)
    }

    fn json(&self) -> Value {
        json!({"median": self.median(), "p90": self.quantile(9, 10), "values": self.0})
    }
}

impl From<f64> for Series {
    fn from(value: f64) -> Self {
        Self(vec![value])
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut series = Self::default();
        for value in values {
            series.push(value);
        }
        series
    }
}

/// What a measurement must keep to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Budget {
    None,
    /// Of the median.
    AtMost(f64),
    /// Of the median, over the floor's.
    TimesFloor(f64),
}

pub(super) struct Row {
    what: &'static str,
    unit: &'static str,
    ours: Series,
    floor: Option<Series>,
    budget: Budget,
    note: String,
}

impl Row {
    pub(super) fn new(what: &'static str, unit: &'static str, ours: impl Into<Series>) -> Self {
        Self {
            what,
            unit,
            ours: ours.into(),
            floor: None,
            budget: Budget::None,
            note: String::new(),
        }
    }

    pub(super) fn floor(mut self, floor: Series) -> Self {
        self.floor = Some(floor);
        self
    }

    pub(super) fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    pub(super) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    fn ratio(&self) -> Option<f64> {
        self.floor
            .as_ref()
            .map(|floor| self.ours.median() / floor.median())
    }

    /// Whether the budget is kept. A measurement without values keeps none.
    fn kept(&self) -> Option<bool> {
        match self.budget {
            Budget::None => None,
            Budget::AtMost(most) => Some(self.ours.median() <= most),
            Budget::TimesFloor(most) => Some(self.ratio().is_some_and(|ratio| ratio <= most)),
        }
    }

    fn json(&self) -> Value {
        let (at_most, times_floor) = match self.budget {
            Budget::None => (None, None),
            Budget::AtMost(most) => (Some(most), None),
            Budget::TimesFloor(most) => (None, Some(most)),
        };
        json!({
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours.json(),
            "floor": self.floor.as_ref().map(Series::json),
            "ratio": self.ratio(),
            "budget": {"atMost": at_most, "timesFloor": times_floor},
            "kept": self.kept(),
            "note": self.note,
        })
    }
}

#[derive(Default)]
pub(super) struct Report(Vec<Row>);

impl Report {
    /// Adds a row and prints it: a run takes minutes.
    pub(super) fn add(&mut self, row: Row) {
        eprintln!(
            "   {}: {} {}",
            row.what,
            number(row.ours.median()),
            row.unit
        );
        self.0.push(row);
    }

    /// How many budgets are not kept.
    pub(super) fn missed(&self) -> usize {
        self.0
            .iter()
            .filter(|row| row.kept() == Some(false))
            .count()
    }

    pub(super) fn json(&self, conditions: Value) -> Value {
        let rows: Vec<Value> = self.0.iter().map(Row::json).collect();
        json!({"conditions": conditions, "measurements": rows})
    }

    pub(super) fn table(&self) -> String {
        let mut lines = vec![[
            "measured".to_owned(),
            "median".to_owned(),
            "p90".to_owned(),
            "floor".to_owned(),
            "ratio".to_owned(),
            "budget".to_owned(),
            String::new(),
            String::new(),
        ]];
        let dash = || "-".to_owned();
        for row in &self.0 {
            lines.push([
                row.what.to_owned(),
                format!("{} {}", number(row.ours.median()), row.unit),
                number(row.ours.quantile(9, 10)),
                row.floor
                    .as_ref()
                    .map_or_else(dash, |floor| number(floor.median())),
                row.ratio().map_or_else(dash, |ratio| format!("{ratio:.2}")),
                match row.budget {
                    Budget::None => dash(),
                    Budget::AtMost(most) => format!("≤ {}", number(most)),
                    Budget::TimesFloor(most) => format!("≤ {most} × floor"),
                },
                match row.kept() {
                    None => String::new(),
                    Some(true) => "kept".into(),
                    Some(false) => "MISSED".into(),
                },
                row.note.clone(),
            ]);
        }
        let width = |column: usize| {
            let widths = lines.iter().map(|line| line[column].chars().count());
            widths.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..8).map(width).collect();
        let mut text = String::new();
        for line in &lines {
            let mut cells = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                cells.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(cells.trim_end());
            text.push('\n');
        }
        text
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 100.0 || value == value.trunc() {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let series: Series = [5.0, 1.0, 4.0, 2.0, 3.0].into_iter().collect();
        assert_eq!(series.median().to_bits(), 3.0_f64.to_bits());
        assert_eq!(series.quantile(9, 10).to_bits(), 5.0_f64.to_bits());
        assert!(Series::default().median().is_nan());
    }

    #[test]
    fn what_was_not_measured_keeps_no_budget() {
        let row = Row::new("x", "ms", Series::default()).budget(Budget::AtMost(1.0));
        assert_eq!(row.kept(), Some(false));
        let row = Row::new("x", "ms", 3.0).budget(Budget::TimesFloor(1.5));
        assert_eq!(row.kept(), Some(false));
        let row = row.floor(2.0.into());
        assert_eq!(row.kept(), Some(true));
    }
}
