r"""A corpus of answers: pairs (answer, gold) with what each verifier must say of them, and hostile answers, which must only end.

Expectations come from what the notation means and from the rules in the verifiers' docstrings, not from a run.
"""

# (answer, gold, equal by math_verify, equal by boxed)
PAIRS = [
    # Integers and their spellings.
    ("42", "42", True, True), ("42", "43", False, False), ("025", "25", True, True), ("25", "025", True, True), ("-7", "7", False, False),
    ("-0", "0", True, True), ("+5", "5", True, True), ("5.0", "5", True, True), ("5.", "5", True, True), ("$5$", "5", True, True), (r"\$5", "5", True, True),
    ("{5}", "5", True, True), (r"\text{5}", "5", True, True), ("1,000", "1000", True, True), ("1{,}000", "1000", True, True), (r"1,\!000", "1000", True, True),
    ("1,000,000", "1000000", True, True), ("12,34", "1234", False, False), ("1000", "100", False, False), ("5 ", "5", True, True),
    (r"\!5", "5", True, True), ("−5", "-5", True, True), ("9" * 400, "9" * 400, True, True), ("9" * 400, "9" * 399 + "8", False, False),
    # An integer is written as one: the original's rule.
    (r"\sqrt{16}", "4", True, False), ("8/2", "4", True, False), (r"\frac{8}{2}", "4", True, False), ("2+2", "4", True, False), ("2^2", "4", True, False),
    ("5!", "120", True, False), (r"3\cdot 4", "12", True, False), ("4", r"\sqrt{16}", True, False), ("(5)", "5", True, True),
    # Fractions and decimals.
    (r"\frac{3}{4}", "0.75", True, True), ("0.75", r"\frac{3}{4}", True, True), ("3/4", r"\frac{3}{4}", True, True), (r"\dfrac{3}{4}", r"\frac34", True, True),
    (r"\tfrac12", "1/2", True, True), (r"\frac12", "0.5", True, True), ("0.5", "1/2", True, True), (".5", "0.5", True, True), (r"\frac{2}{4}", r"\frac{1}{2}", True, False),
    ("6/8", "3/4", True, False), (r"\frac{-1}{2}", r"-\frac{1}{2}", True, True), (r"\frac{1}{-2}", r"-\frac12", True, True), (r"\frac1{72}", "1/72", True, True),
    ("0.333", "1/3", False, False), ("0.25", "1/4", True, True), ("1.50", "1.5", True, True), ("1.5", "3/2", True, True), (r"\frac{3}{4}", r"\frac{4}{3}", False, False),
    (r"7\frac{3}{4}", "31/4", True, True), ("7 3/4", "31/4", True, True), ("1 1/2", "1.5", True, True), (r"\left(\frac{1}{2}\right)", r"\frac{1}{2}", True, True),
    (r"\frac{10}{3}", "10/3", True, True), ("3.14", r"\pi", False, False), ("22/7", r"\pi", False, False), (r"\frac{\frac{1}{2}}{3}", r"\frac{1}{6}", True, True),
    # Roots, pi, products.
    (r"2\sqrt{3}", r"\sqrt{12}", True, True), (r"\sqrt3", r"\sqrt{3}", True, True), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True, True),
    (r"3\sqrt{2}", r"2\sqrt{3}", False, False), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{3}+\sqrt{2}", True, True), (r"\frac{\pi}{4}", r"\frac{1}{4}\pi", True, True),
    (r"2\pi", r"\pi \cdot 2", True, True), (r"2\pi", r"3\pi", False, False), ("2π", r"2\pi", True, True), (r"\pi r^2", r"r^2\pi", True, True),
    (r"\sqrt[3]{8}", r"\sqrt[3]{8}", True, True), (r"(1+\sqrt{5})/2", r"\frac{1+\sqrt{5}}{2}", True, True), (r"5\sqrt{5}", "11.18", False, False),
    (r"\sqrt{x^2}", "x", False, False), (r"-\sqrt{2}", r"\sqrt{2}", False, False), (r"12\pi-9\sqrt{3}", r"-9\sqrt{3}+12\pi", True, True),
    # Algebra.
    ("x+1", "1+x", True, True), ("2x", r"x\cdot 2", True, True), ("x^2+2x+1", "(x+1)^2", True, True), ("x-1", "1-x", False, False), ("x+y", "y+x", True, True),
    ("a+b+c", "c+b+a", True, False), ("x^{10}", "x^{10}", True, True), ("x^{12}", "(x^{6})^{2}", True, False), (r"\frac{x^2-1}{x-1}", "x+1", True, True),
    ("(x+1)(x-1)", "x^2-1", True, True), ("2(x+3)", "2x+6", True, True), ("x^2", "x^3", False, False), ("3n+1", "1+3n", True, True), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", True, True),
    ("2^{n+1}", r"2\cdot 2^{n}", True, False), ("x", "y", False, False), (r"\frac{1}{x+1}", r"(x+1)^{-1}", True, False), ("n^2-n", "n(n-1)", True, True),
    # Equations.
    ("x=5", "5", True, True), ("x = 5", "5", True, True), ("5", "x=5", True, True), ("7=5", "5", False, True), ("x=5", "6", False, False),
    # Degrees, per cent, units, currency.
    (r"90^\circ", "90", True, True), (r"90^{\circ}", "90", True, True), ("90°", "90", True, True), (r"50\%", "50", True, True), ("50%", "50", True, True),
    (r"50\%", "0.5", True, False), (r"12\text{ cm}", "12", True, True), (r"12\,\text{cm}", "12", True, True), ("12 cm", "12", True, True), ("12 inches", "12", True, True),
    (r"12\text{ cm}^2", "12", True, True), (r"\$12.50", "12.50", True, True), (r"45\text{ degrees}", "45", True, True), (r"12\text{ cm}", r"12\text{ m}", False, True),
    (r"5\text{ minutes}", "5", True, True), ("5 feet", "5", True, True),
    # Tuples, intervals, sets.
    ("(1,2)", "(1, 2)", True, True), (r"\left(1,2\right)", "(1,2)", True, True), ("(1,2)", "(2,1)", False, False), ("(1,2)", "(1,2,3)", False, False),
    (r"(\frac12,3)", "(1/2,3)", True, True), ("(0.25,1)", "(1/4,1)", True, True), ("[1,2)", "[1,2)", True, True), ("[1,2)", "(1,2)", False, False), ("[1,2]", "[1,2)", False, False),
    (r"\{1,2\}", r"\{2,1\}", True, False), (r"\{1,2\}", r"\{1, 2\}", True, True), (r"\{1,2\}", r"\{1,3\}", False, False), ("1,2", "1, 2", True, True),
    ("1 and 2", "1, 2", True, True), (r"1\text{ or }2", "1,2", True, False), ("1,2", "2,1", True, False), (r"(-\infty,3)", r"(-\infty, 3)", True, True),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)\cup(2,\infty)", True, True), (r"(x+1,\sqrt{12})", r"(1+x,2\sqrt{3})", True, True), ("(1,2)", "[1,2]", False, False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True, True), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False, False),
    # Words, bases, functions.
    (r"\text{Monday}", "Monday", True, True), ("monday", r"\text{Monday}", True, True), (r"\text{Monday}", "Tuesday", False, False), ("B", r"\text{B}", True, True), ("A", "B", False, False),
    (r"\text{(C)}", "C", True, True), ("Evelyn", r"\text{Evelyn}", True, True), ("even", "odd", False, False), (r"\text{ No }", "no", True, True),
    # Data sets' answers as they come: boxed, in math shifts, in a sentence.
    ("1700", r"\boxed{1700}", True, True), ("60", r"\[\boxed{60}\]", True, True), ("17", r"\boxed{1700}", False, False), ("197", r"\[\boxed{N=197}\]", True, True), ("No", r"$\text { No }$", True, True), ("12431_7", "12431_{7}", True, False), ("12431_8", "12431_7", False, False),
    (r"\sin x", r"\sin{x}", True, False), (r"\log_2 3", r"\log_2 3", True, True), (r"\ln 4", r"2\ln 2", True, False), (r"e^2", "e^2", True, True), ("i", "i", True, True),
    (r"\binom{5}{2}", r"\binom{5}{2}", True, True), (r"\infty", r"\infty", True, True), (r"\infty", r"-\infty", False, False), ("3+4i", "4i+3", True, True), ("3+4i", "3-4i", False, False),
]
# Numbers in the spellings of a fraction, a decimal, a sum, a product: what both must see, and what is near it.
for n in range(2, 22):
    PAIRS += [
        (rf"\frac{{{2 * n + 1}}}{{2}}", f"{n}.5", True, True),
        (rf"\frac{{{2 * n + 1}}}{{2}}", f"{n + 1}.5", False, False),
        (f"{n}x+{n}", f"{n}(x+1)", True, True),
        (rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n}}}", True, True),
        (rf"\frac{{{3 * n}}}{{{3 * n * n}}}", rf"\frac{{1}}{{{n}}}", True, False),
        (f"{n},{n:03d}", f"{n * 1001}", True, True),
        (rf"x={n}\text{{ cm}}", f"{n}", True, True),
        (f"{n}-x", f"x-{n}", False, False),
    ]

# What a model may write by accident or to win. The gold is 5.5 for all: a gold of 5 would spare the second verifier its sympy.
HOSTILE = [
    "9^{9^{9^9}}", "9^9^9^9", "(((((((9^9)^9)^9)^9)^9)^9)^9)^9+0.5", r"\Gamma(10^9)", "10^{10^9}", r"\binom{10^9}{10^8}", "100000!!", "((10^9)!)!", r"\sum_{k=1}^{10^9} k", r"\int e^{e^{e^x}} dx",
    r"\prod_{n=1}^{99999} n", "+".join(["1"] * 250), "+".join(f"x_{{{i}}}" for i in range(60)), "+".join(f"a_{i}b_{i}" for i in range(60)), "".join(f"(x+{i})" for i in range(60)),
    "(" * 250 + "5" + ")" * 250, r"\sqrt{" * 70 + "5" + "}" * 70, r"\frac{1}{1+" * 40 + "x" + "}" * 40, "{" * 200 + "}" * 200, r"\{" * 200, "(" * 500, ")" * 500, "-" * 500, "^" * 400,
    "1" + "^1" * 200, "x" + "^x" * 200, "5" + "!" * 400, "=".join(["5"] * 200), ",".join(["5"] * 250), "(" + ",".join(["5"] * 200) + ")", r"\frac" * 100, r"\sqrt" * 100, r"\boxed{5",
    r"\text{" * 100 + "}" * 100, "\\" * 500, "$" * 500, "%" * 500, "~" * 500, "5\x00", "\x00" * 500, "\ud7ff" * 500, "\u202e5", "５", "५", "⁵", "𝟓", "Ⅴ", "😀" * 400, "e\u0301" * 200, "\u200b5", "ﷺ" * 300,
    "__import__('os').abort()", "().__class__.__bases__", "x.__class__", "exec('1')", "lambda: 5", "5 if 1 else 6", "True", "None", "nan", "inf", "-inf", "1e309", "1e-400", "0x5", "5j", "0/0", r"\frac{1}{0}",
    r"\begin{matrix}" * 30, r"\begin{pmatrix}" + "1&" * 100 + r"\end{pmatrix}", r"\lim_{x\to\infty}" * 20, r"\left(" * 60, r"\mathrm{" * 60, "5;5", "5\n5", "\t" * 400, " " * 500, "a" * 512, "1 " * 250, "1/" * 250 + "1",
    ".".join(["5"] * 200), r"5\\", r"\\5", r"\ 5", r"\,5\,", "[5", "5]", "]5[", ")5(", "<think>5</think>", r"\not=5", "5?", "5'", '"5"', "#5", "&5", "@5", "x" * 300 + "=5",
]
# Whole responses.
HOSTILE_RESPONSES = [
    r"\boxed{" * 300_000, r"\boxed{" * 100_000 + "5" + "}" * 100_000, "{" * 2_000_000, "}" * 2_000_000, r"\boxed{5}" * 200_000, "\\" * 2_000_000, "</think>" * 200_000 + r"\boxed{6}", r"\fbox" * 300_000,
    r"\boxed" + " " * 1_000_000 + "{5", r"\boxed{" + "{}" * 500_000, "<think>" * 100_000, "",
]
