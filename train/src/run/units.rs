//! Numbers for people.

/// Bytes in binary units.
pub fn bytes(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value} B"),
        _ if scaled < 10.0 => format!("{scaled:.2} {}", units[unit]),
        _ if scaled < 100.0 => format!("{scaled:.1} {}", units[unit]),
        _ => format!("{scaled:.0} {}", units[unit]),
    }
}

/// Whole numbers with a comma after each three digits.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Seconds as hours, minutes and seconds.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_three_digits_and_a_unit() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(50 << 20), bytes(700 << 30)],
            ["0 B", "1023 B", "1.50 KiB", "50.0 MiB", "700 GiB"]
        );
        assert_eq!([count(0), count(999), count(1000), count(1234567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([duration(59.4), duration(61.0), duration(3700.0)], ["59 s", "1 min 01 s", "1 h 01 min"]);
    }
}
