"""Write science exercises drawn from formulas as a problem file: quantities with units, or the same as multiple choice.

python examples/science_exercises.py science.jsonl --level 1 --topics speed density ohm --largest 30 --count 256
python examples/science_exercises.py choices.jsonl --kind choices

Levels: 1: one formula in its own units; 2: with a conversion of units; 3: two steps; 0: all in turn. Every constant that
is needed stands in the question. Wrong options are typical slips: a forgotten square, half, or conversion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("quantities", "choices")
LEVELS = (1, 2, 3)
OPTIONS = 4
MOST_MISSES = 20_000  # exercises in a row that are known or not as asked for
NUMBER = re.compile(r"(?<!\^)\b\d+(?:\.\d+)?")  # exponents of units are none


@dataclass(frozen=True)
class Exercise:
    """A question, its value in `unit`, and values that typical slips give."""

    question: str
    value: float
    unit: str
    slips: tuple[float, ...]


def _pick(rng: random.Random, low: int, high: int, step: int = 1) -> int:
    return rng.randrange(low, high + 1, step)


def _speed(rng: random.Random, level: int) -> Exercise:
    minutes, speed = _pick(rng, 3, 90), _pick(rng, 4, 60)
    if level == 1:
        seconds = minutes * 3
        text = f"A cyclist rides at a constant speed of {speed} m/s for {seconds} s. How far does the cyclist ride?"
        return Exercise(text, speed * seconds, "m", (speed / seconds, speed + seconds, speed * seconds / 2))
    if level == 2:
        text = f"A car drives at {speed} km/h for {minutes} minutes. How far does it go, in metres?"
        right = speed * minutes / 60 * 1000
        return Exercise(text, right, "m", (speed * minutes, right / 1000, speed * minutes * 1000, right * 3.6))
    start, rate = _pick(rng, 2, 20), _pick(rng, 1, 6)
    text = (
        f"A train moves at {start} m/s and then speeds up at a constant {rate} m/s^2 for {minutes} s. "
        "How far does it go while it speeds up?"
    )
    right = start * minutes + rate * minutes**2 / 2
    return Exercise(text, right, "m", (start * minutes, start * minutes + rate * minutes**2, rate * minutes**2 / 2))


def _fall(rng: random.Random, level: int) -> Exercise:
    height, g = _pick(rng, 5, 180), 9.81
    time = math.sqrt(2 * height / g)
    rest = "Take g = 9.81 m/s^2 and neglect air resistance."
    if level == 1:
        speed = _pick(rng, 2, 12)
        text = f"A stone falls from rest for {speed} s. What is its speed then? {rest}"
        return Exercise(text, g * speed, "m/s", (g * speed**2 / 2, g * speed / 2, g + speed))
    if level == 2:
        text = f"A stone falls from rest from a height of {height * 100} cm. How long does it fall? {rest}"
        return Exercise(text, time, "s", (math.sqrt(height / g), 2 * height / g, time * 10))
    across = _pick(rng, 3, 30)
    text = (
        f"A ball is thrown horizontally at {across} m/s from a cliff {height} m high. With what speed does it hit the "
        f"ground? {rest}"
    )
    right = math.hypot(across, g * time)
    return Exercise(text, right, "m/s", (across + g * time, g * time, math.hypot(across, time)))


def _density(rng: random.Random, level: int) -> Exercise:
    mass, volume = _pick(rng, 20, 900), _pick(rng, 5, 80)
    if level == 1:
        text = f"A block has a mass of {mass} g and a volume of {volume} cm^3. What is its density?"
        return Exercise(text, mass / volume, "g/cm^3", (volume / mass, mass * volume, mass / volume / 2))
    if level == 2:
        text = f"A block has a mass of {mass} g and a volume of {volume} cm^3. What is its density in kg/m^3?"
        right = 1000 * mass / volume
        return Exercise(text, right, "kg/m^3", (mass / volume, right / 10, 1e6 * mass / volume, 1000 * volume / mass))
    side, dense = _pick(rng, 2, 9), _pick(rng, 2, 19)
    text = (
        f"A solid cube with edges of {side} cm is made of a metal of density {dense} g/cm^3. What is its weight? "
        "Take g = 9.81 m/s^2."
    )
    right = side**3 * dense / 1000 * 9.81
    return Exercise(text, right, "N", (right / 9.81, right * 1000, side**2 * dense / 1000 * 9.81))


def _ohm(rng: random.Random, level: int) -> Exercise:
    volts, one, two = _pick(rng, 3, 48), _pick(rng, 10, 400, 5), _pick(rng, 12, 600, 7)
    if level == 1:
        text = f"A resistor of {one} ohm is connected to {volts} V. What current flows through it?"
        return Exercise(text, volts / one, "A", (one / volts, volts * one, volts**2 / one))
    if level == 2:
        text = f"A current of {one} mA flows through a resistor of {two} kohm. What is the voltage across it?"
        product = one * two
        return Exercise(text, product, "V", (product / 1000, product * 1000, two / one))
    text = (
        f"Resistors of {one} ohm and {two} ohm are connected in parallel to {volts} V. What power do they take in all?"
    )
    right = volts**2 / one + volts**2 / two
    return Exercise(text, right, "W", (volts**2 / (one + two), volts / one + volts / two, right / volts**2))


def _gas(rng: random.Random, level: int) -> Exercise:
    moles, celsius, litres = _pick(rng, 1, 12), _pick(rng, 5, 95), _pick(rng, 2, 60)
    rest = "Take R = 8.314 J/(mol K)."
    if level == 1:
        kelvin = 273 + celsius
        text = f"{moles} mol of an ideal gas fill 1 m^3 at {kelvin} K. What is the pressure? {rest}"
        right = moles * 8.314 * kelvin
        return Exercise(text, right, "Pa", (moles * 8.314 * celsius, right / 8.314, 8.314 * kelvin / moles))
    if level == 2:
        text = (
            f"{moles} mol of an ideal gas fill {litres} L at {celsius} degrees Celsius (0 C is 273.15 K). "
            f"What is the pressure in kPa? {rest}"
        )
        right = moles * 8.314 * (celsius + 273.15) / litres
        return Exercise(text, right, "kPa", (moles * 8.314 * celsius / litres, right * 1000, right / 1000))
    later, smaller = celsius + _pick(rng, 30, 300, 5), _pick(rng, 1, max(1, litres // 2))
    text = (
        f"A gas at 101 kPa and {celsius} degrees Celsius fills {litres} L. It is heated to {later} degrees Celsius and "
        f"pressed into {smaller} L. What is its pressure then, in kPa? (0 C is 273.15 K)"
    )
    ratio = (later + 273.15) / (celsius + 273.15)
    right = 101 * ratio * litres / smaller
    return Exercise(
        text, right, "kPa", (101 * later / celsius * litres / smaller, 101 * ratio * smaller / litres, right / ratio)
    )


def _decay(rng: random.Random, level: int) -> Exercise:
    half, amount, lives = _pick(rng, 2, 40), _pick(rng, 20, 960, 20), _pick(rng, 2, 6)
    sample = f"A sample holds {amount} mg of an isotope with a half-life of {half} days."
    if level == 1:
        text = f"{sample} How much is left after {half * lives} days?"
        return Exercise(
            text, amount / 2**lives, "mg", (amount / lives, amount / (2 * lives), amount / 2 ** (lives - 1))
        )
    if level == 2:
        hours = half * 24 * lives // 2
        text = f"{sample} How much is left after {hours} hours?"
        gone = hours / 24 / half
        return Exercise(
            text,
            amount / 2**gone,
            "mg",
            (amount / 2 ** (hours / half), amount / (1 + gone), amount * (1 - 1 / 2**gone)),
        )
    share = _pick(rng, 5, 45)
    text = f"Of an isotope with a half-life of {half} years, {share} % of the atoms are left. How old is the sample?"
    right = -half * math.log2(share / 100)
    return Exercise(
        text, right, "year", (half * (1 - share / 100), -half * math.log(share / 100), half / (share / 100))
    )


def _dilution(rng: random.Random, level: int) -> Exercise:
    strong, volume, final = _pick(rng, 2, 12), _pick(rng, 5, 60), _pick(rng, 100, 900, 25)
    if level == 1:
        text = f"{volume} mL of a {strong} mol/L solution are diluted to {final} mL. What is the new concentration?"
        right = strong * volume / final
        return Exercise(
            text, right, "mol/L", (strong * volume / (final + volume), strong * final / volume, strong / final)
        )
    if level == 2:
        text = f"{final} mg of salt are dissolved to give {volume} mL of solution. What is the concentration in g/L?"
        right = final / volume
        return Exercise(text, right, "g/L", (right / 1000, volume / final, right * 10))
    molar = _pick(rng, 40, 180)
    text = (
        f"{strong} g of a substance of molar mass {molar} g/mol are dissolved to {final} mL, and {volume} mL of that "
        "are diluted to 1 L. What is the final concentration in mmol/L?"
    )
    right = strong / molar / (final / 1000) * volume
    return Exercise(text, right, "mmol/L", (right / 1000, strong * molar / final * volume, strong / molar * volume))


def _heat(rng: random.Random, level: int) -> Exercise:
    mass, rise, capacity = _pick(rng, 2, 30), _pick(rng, 5, 75), 4180.0
    rest = "The specific heat capacity of water is 4180 J/(kg K)."
    if level == 1:
        text = f"How much heat warms {mass} kg of water by {rise} K? {rest}"
        right = mass * rise * capacity
        return Exercise(text, right, "J", (mass * capacity, right / mass, capacity * rise / mass))
    if level == 2:
        text = f"How much heat, in kJ, warms {mass * 100} g of water from {rise} to {rise + 15} degrees Celsius? {rest}"
        right = mass / 10 * 15 * capacity / 1000.0
        return Exercise(text, right, "kJ", (right * 1000, mass / 10 * (rise + 15) * 4.18, right / 10))
    power = _pick(rng, 500, 3000, 100)
    text = (
        f"A heater of {power} W warms {mass} kg of water by {rise} K without losses. "
        f"How many minutes does that take? {rest}"
    )
    right = mass * rise * capacity / power / 60
    return Exercise(text, right, "minute", (right * 60, right / 60, mass * rise * capacity / power / 3600 * 2))


def _energy(rng: random.Random, level: int) -> Exercise:
    mass, speed = _pick(rng, 2, 80), _pick(rng, 3, 40)
    right = mass * speed**2 / 2
    if level == 1:
        text = f"What is the kinetic energy of a body of {mass} kg that moves at {speed} m/s?"
        return Exercise(text, right, "J", (mass * speed**2, mass * speed / 2, mass * speed))
    if level == 2:
        text = f"What is the kinetic energy, in kJ, of a car of {mass * 100} kg at {speed * 3} km/h?"
        moved = mass * 100 * (speed * 3 / 3.6) ** 2 / 2000
        return Exercise(text, moved, "kJ", (mass * 100 * (speed * 3) ** 2 / 2000, moved * 2, moved * 1000))
    way = _pick(rng, 2, 60)
    text = (
        f"A body of {mass} kg at {speed} m/s is stopped over a distance of {way} m by a constant force. "
        "How large is the force?"
    )
    return Exercise(text, right / way, "N", (mass * speed**2 / way, mass * speed / way, right * way))


def _wave(rng: random.Random, level: int) -> Exercise:
    length, frequency = _pick(rng, 2, 60), _pick(rng, 20, 900, 5)
    if level == 1:
        text = f"A wave has a wavelength of {length} m and a frequency of {frequency} Hz. How fast does it travel?"
        return Exercise(text, length * frequency, "m/s", (frequency / length, length / frequency, length + frequency))
    if level == 2:
        text = f"Radio waves travel at 3.00e8 m/s. What is the wavelength at {frequency} MHz?"
        return Exercise(text, 300 / frequency, "m", (3e8 / frequency, frequency / 300, 300 * frequency))
    delay = _pick(rng, 50, 950, 10)
    text = (
        f"A ship's sonar hears its echo from the sea bed after {delay} ms. Sound travels at 1500 m/s in water. "
        "How deep is the sea?"
    )
    right = 1500 * delay / 2000
    return Exercise(text, right, "m", (right * 2, right * 1000, right / 2))


TOPICS: dict[str, Callable[[random.Random, int], Exercise]] = {
    "speed": _speed,
    "fall": _fall,
    "density": _density,
    "ohm": _ohm,
    "gas": _gas,
    "decay": _decay,
    "dilution": _dilution,
    "heat": _heat,
    "energy": _energy,
    "wave": _wave,
}


def spell(value: float) -> str:
    """Three significant figures: `12.5`, `0.0450`, `1.25e6`."""
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    rounded = round(value, digits)
    return f"{rounded:.{max(0, digits)}f}"


def exercises(
    kind: str, count: int, seed: int, level: int = 0, topics: Sequence[str] = tuple(TOPICS), largest: int = 0
) -> Iterator[dict[str, Any]]:
    """`count` distinct rows: question, answer, topic, level, and for `choices` the options in the order right, wrong ...

    Exercise i depends on (seed, i) and the options alone. largest: of the numbers in a question, 0: any. Raises
    ValueError when the options have fewer exercises.
    """
    seen: set[str] = set()
    number = misses = 0
    while len(seen) < count:
        topic, at = topics[number % len(topics)], level or LEVELS[number // len(topics) % len(LEVELS)]
        exercise = TOPICS[topic](random.Random(f"{seed}:{topic}:{at}:{number}"), at)
        number += 1
        answers = _answers(exercise)
        over = largest and any(float(text) > largest for text in NUMBER.findall(exercise.question))
        if over or exercise.question in seen or len(answers) < OPTIONS:
            misses += 1
            if misses > MOST_MISSES:
                raise ValueError(f"these options have {len(seen)} different exercises, but {count} are asked for")
            continue
        seen.add(exercise.question)
        misses = 0
        row = {"question": exercise.question, "answer": answers[0], "topic": topic, "level": at}
        yield row if kind == "quantities" else {**row, "options": answers}


def _answers(exercise: Exercise) -> list[str]:
    """The right answer and three wrong ones, more than 5 % apart from each other."""
    scaled = (exercise.value * 2, exercise.value / 2, exercise.value * 10, exercise.value / 10)
    kept = [exercise.value]
    for value in (*exercise.slips, *scaled):
        if value > 0 and math.isfinite(value) and all(abs(value - other) > 0.05 * max(value, other) for other in kept):
            kept.append(value)
    return [f"{spell(value)} {exercise.unit}" for value in kept[:OPTIONS]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--kind", choices=KINDS, default="quantities")
    parser.add_argument("--level", type=int, choices=(0, *LEVELS), default=0)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--largest", type=int, default=0, help="largest number in a question; 0: any")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    path = options.pop("file")
    try:
        lines = [json.dumps(row) + "\n" for row in exercises(**options)]
    except ValueError as error:
        parser.error(str(error))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
