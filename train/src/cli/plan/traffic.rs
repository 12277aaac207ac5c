//! Traffic of a run in several processes.

use crate::build::BuildError;
use crate::config::{bytes, count, parse_bytes};
use crate::plan::{Candidate, Forecaster};
use crate::process::{share_bytes, sum_bytes};

/// Bytes a second of a text such as `10Gbit/s` or `1.2GB/s`.
pub fn bandwidth(text: &str) -> Result<f64, BuildError> {
    let units = [("bit/s", 8.0), ("b/s", 1.0)];
    let lower = text.trim().to_ascii_lowercase();
    let parsed = units.into_iter().find_map(|(unit, divisor)| {
        let amount = parse_bytes(&format!("{}b", lower.strip_suffix(unit)?))?;
        Some(amount as f64 / divisor)
    });
    let problem = format!("--bandwidth {text}: write it as a number with a unit, such as 10Gbit/s or 1.2GB/s");
    parsed.ok_or(BuildError::Settings(problem))
}

/// Table of the traffic of a step of a variant, with a row for 1, 2, 4 and so on processes up to a number.
pub fn traffic(
    forecaster: &Forecaster<'_>,
    candidate: &Candidate,
    ranks: u32,
    speed: Option<f64>,
) -> Result<Vec<Vec<String>>, BuildError> {
    let Candidate { config, forecast, .. } = candidate;
    let mut head = ["PROCESSES", "ROWS IN A STEP", "MEMORY OF EACH", "EACH SENDS IN A STEP"].map(String::from).to_vec();
    head.extend(speed.map(|_| "AT THIS SPEED".to_string()));
    let mut rows = vec![head];
    let mut numbers: Vec<u64> = (0..).map(|power| 1 << power).take_while(|number| *number < u64::from(ranks)).collect();
    numbers.push(u64::from(ranks));
    // Values are f32 in sums, whatever their storage.
    let values = forecast.trained / 4;
    for number in numbers {
        let weights = if config.train.shard_state { share_bytes(forecast.trained, number) } else { 0 };
        let sent = sum_bytes(values, number) + weights;
        let mut row = vec![
            count(number),
            count(number * (config.train.batch * config.train.accumulation) as u64),
            bytes(forecaster.forecast_for(config, number as usize)?.peak),
            bytes(sent),
        ];
        row.extend(speed.map(|speed| format!("{:.3} s", sent as f64 / speed)));
        rows.push(row);
    }
    Ok(rows)
}
