r"""What is right, what is wrong, and what is neither."""

import pytest

from s2dcli.grade import answer


def verdict(gold, completion, judge=answer.MATH, lenient=False, thinking=False, ordered=None):
    return answer.grade(gold, completion, thinking, ordered, judge=judge, lenient=lenient, progress=lambda *_: None)


RIGHT = [
    (r"\frac{1}{x-1}-\frac{1}{x+1}", r"\frac{2}{x^2-1}"), (r"\sin(2x)", r"2\sin(x)\cos(x)"),
    ("B", "b"), ("C", "(c)"),
    ("(100,200)", "(100, 200)"), ("100, 200", "200, 100"), (r"\{100,200\}", "200, 100"), ("1,234", "1234"), ("12,345.5", "12345.5"),
    ("1,234", r"{1,234}"), ("1,234", r"1,234\text{ cm}"),
    ("7", "7"), ("7", "7.0"), ("7", "+7"), ("-7", "−7"), ("7", "007"), ("7", "７"), ("70", "7\u200b0"), ("7", "$7$"),
    ("7", r"\(7\)"), ("7", "{7}"), ("7", "(7)"), ("7", "((((7))))"), ("1200", "1,200"), ("1200", "1{,}200"),
    ("1200", r"1\,200"), ("1200", "1 200"), ("1234567", r"1,\!234,\!567"), ("0.5", ".5"), ("1/2", "0.5"),
    (r"\frac12", "1/2"), (r"\frac{1}{2}", r"\dfrac{2}{4}"), ("2.5", r"2\frac{1}{2}"), ("-2.5", r"-2\frac12"),
    ("0.003", r"3\times 10^{-3}"), ("5000", "5e3"), ("15%", r"15\%"), ("15", r"15\%"), ("0.15", r"15\%"),
    ("15", r"15\text{ cm}"), ("15", r"15\text{ cm}^2"), (r"15\mbox{ cm}", "15"), (r"45^\circ", "45"), (r"\$15", "15"),
    ("x=3", "3"), ("3", "x = 3"), ("3", "f(2) = 3"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"), ("1,2", "2, 1"),
    ("1,2", r"\{2,1\}"), ("1,2", r"1\text{ and }2"), ("(1,2)", r"\left( 1, 2 \right)"), ("(0.5,2)", r"(\frac12, 2)"),
    (r"[0,\infty)", r"[0, +\infty)"), (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"), (r"\text{even}", "even"),
    ("even", r"\text{Even}"), ("B", "(B)"), ("(B)", r"\text{B}"), ("B", "B. nine"), ("x<3", "3>x"),
    (r"x \in [1,2]", "[1,2]"), (r"\frac{1}{0}", r"\frac{1}{0}"), ("1101_2", "1101_{2}"), ("1101_2", "1101"),
    (r"\boxed{5}", "5"), ("10^{400}", "10^{400}"), ("1" * 5000, "1" * 5000), (r"\tan^2 y+1", r"\sec^2 y"),
    ("3:2", r"\frac{3}{2}"), ("f(x)=2x", "f(y)=2y"),
]  # fmt: skip

WRONG = [
    ("x", r"\sqrt{x^2}"), (r"2\ln x", r"\ln(x^2)+1"), (r"\sin x", r"\cos x"), ("x^3", "x^{3.0001}"),
    ("(100,200)", "(200,100)"), ("1, 234", "1234"), ("(100,200)", "100200"), ("2^{10}", "2^{11}"), (r"2\frac12", "1"),
    (r"\frac{1}{2}ab", r"\frac{1}{2}a"),
    ("7", "8"), ("7", "70"), ("7", "-7"), ("7", "7x"), ("7", "x+7"), ("7", "6=7"), ("7", "x=6=7"),
    ("7", "(-\\infty,\\infty)"), ("7", "7,8"), ("7,7", "7"), ("7", "7,7"), ("1/3", "0.333333"), ("0.3333333", "0.333333"),
    ("12345678901234567891", "12345678901234567890"), (r"2^{-80}", r"2^{-81}"), ("0", r"10^{-30}"),
    (r"\frac{1}{50!}", r"\frac{1}{51!}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("1,2", "1,3"), ("1,2,3", "1,2"),
    (r"x^2+1", r"y^2+1"), (r"x+1", "x-1"), (r"\pi", "3.14159"), (r"1-\frac{1}{e}", r"1+\frac{1}{e}"), ("1101_2", "1101_3"),
    ("1235", r"1\,234"), ("235", r"1\,234"), ("B", "C"), ("(B)", "(A) and not (B)"), (r"\text{even}", "odd"),
    ("even", r"\text{not even}"), ("15%", "1500"), ("10", r"0.1\%"), (r"60^\circ", r"\frac{\pi}{4}"), ("4", r"4\sqrt(2)"),
    ("5", r"\frac{5}{0}"), ("x=3", "y=3"), ("5", "{}"), ("3", "3!"),
]  # fmt: skip


# Answers in several parts, units, named values, approximations, sets of solutions and of real numbers, words.
RIGHT_FORMS = [
    ("12", r"12\textnormal{ km}"), ("12", r"12\mathrm{km}"), ("12", r"12\,\mathrm{km/h}"), ("12", r"12 \mathrm{~cm}^2"),
    ("12", r"12 \text{ cm}^{2}"), ("12", r"12\ \text{m/s}^2"), (r"12 \mathrm{km}", "12"), ("12 km", "12"), ("12 km/h", "12"),
    (r"12 \text{ km}", "12 km"), ("12", "12 km"), ("12", "12 km/h"), ("12", "12 cm^2"), ("12", r"12 \text{ dollars}"),
    ("12", "12 dollars"), ("12", r"12\text{ }\mathrm{m}^3"), ("12", r"12 \operatorname{cm}"), (r"2\sqrt{3}", r"2\sqrt{3}\text{ cm}"),
    (r"2\sqrt{3}", r"2\sqrt{3}\mathrm{~cm}"), (r"2\sqrt{3}", r"2\sqrt{3} \textnormal{ units}"),
    (r"\frac{5}{2}", r"\frac{5}{2}\,\mathrm{hours}"), ("a=4", "4"), ("4", "a = 4"), (r"a=-3-\sqrt{5}", r"-3-\sqrt{5}"),
    (r"-3-\sqrt{5}", r"a=-3-\sqrt{5}"), (r"a=2, a=-6-4\sqrt{2}", r"2, -6-4\sqrt{2}"), (r"$a=2$, $a=-6-4 \sqrt{2}$", r"-6-4\sqrt{2}, 2"),
    ("p=7,q=3;p=11,q=3", "(7,3),(11,3)"), ("p=7,q=3;p=11,q=3", "(p,q)=(11,3),(7,3)"),
    ("p=7,q=3;p=11,q=3", r"(p, q) = (7, 3) \text{ and } (11, 3)"), ("p=7,q=3;p=11,q=3", "p=11, q=3; p=7, q=3"), ("p=7,q=3", "(7,3)"),
    ("p=7,q=3", "(p,q) = (7,3)"), ("p=7,q=3", "7,3"), ("p=7,q=3", "q=3, p=7"), ("(7,3)", "p=7, q=3"), ("(7,3)", "x = 7, y = 3"),
    ("(7,3),(11,3)", r"(x,y) = (7,3) \text{ or } (x,y)=(11,3)"), ("(7,3),(11,3)", r"x=7,y=3 \text{ or } x=11,y=3"),
    ("(p,q)=(7,3),(11,3)", "(7,3),(11,3)"), ("$(p,q)=(7,3)$ or $(11,3)$", "(7,3),(11,3)"), ("|CD|=6", "6"), ("6", "|CD| = 6"),
    (r"\angle ABC = 60^\circ", "60"), (r"S_{\triangle ABC}=6", "6"), ("6", r"\overline{AB} = 6"), ("AB = 6", "6"),
    ("x_{1}=2, x_{2}=5", "2, 5"), ("x_{1}=2, x_{2}=5", "x=2, x=5"), ("x_{1}=2, x_{2}=5", "x_1=5, x_2=2"),
    (r"x_{1}=\frac{1+\sqrt{5}}{2}, x_{2}=\frac{1-\sqrt{5}}{2}", r"\frac{1\pm\sqrt{5}}{2}"),
    (r"x_{1}=\frac{1+\sqrt{5}}{2}, x_{2}=\frac{1-\sqrt{5}}{2}", r"x = \frac{1\pm\sqrt{5}}{2}"), (r"x_{1,2}=\pm 3", "3,-3"),
    ("x_1=1,x_2=2,x_3=4", "(1,2,4)"), ("g(x)=2", r"g(x) = 2 \text{ for all } x"), ("g(x)=2", r"g(x) = 2 \text{ for all real } x"),
    ("f(x)=x", r"f(x) = x \text{ for all } x \in \mathbb{R}"), ("f(x)=x, f(x)=2-x", r"f(x)=x \text{ and } f(x)=2-x \text{ for all } x"),
    ("f(x)=0", r"f(x) \equiv 0"), ("f(x)=x+1", "f(n)=n+1"), (r"\frac{3+\sqrt{41}}{7} \approx 1.34", r"\frac{3+\sqrt{41}}{7}"),
    (r"\frac{3+\sqrt{41}}{7} \approx 1.34", r"\frac{\sqrt{41}+3}{7}"),
    (r"x=\frac{3+\sqrt{41}}{7} \approx 1.34", r"\frac{3+\sqrt{41}}{7}"),
    (r"\frac{3+\sqrt{41}}{7} \approx 1.34", r"\frac{3+\sqrt{41}}{7} \approx 1.343"), (r"\frac{3+\sqrt{41}}{7} \approx 1.34", "1.34"),
    (r"\frac{7}{9}", r"\frac{7}{9} \approx 0.78"), (r"\frac{7}{9}", r"x = \frac{7}{9} \approx 0.78"),
    (r"\sqrt{2}", r"\sqrt{2} \approx 1.414"), (r"3\pi", r"3\pi \approx 9.42 \text{ cm}"), ("0.78", r"\frac{7}{9} \approx 0.78"),
    ("1/7", "0.1428571428571429"), (r"\frac{1}{7}", "0.142857142857"), ("0.1428571428571429", r"\frac17"),
    (r"\frac{5}{3}", "1.6666666666666667"), (r"\frac{2}{3}", "0.6666666666"), ("1.34", r"\frac{3+\sqrt{41}}{7}"), ("9.42", r"3\pi"),
    ("14.29", "14.285714285714"), ("2,-2,9,-9", "-9,-2,2,9"), ("2,-2,9,-9", r"\pm 2, \pm 9"), ("2,-2,9,-9", r"\{2, -2, 9, -9\}"),
    ("0,3,-3", "3, 0, -3"), (r"(-\infty,3)", "x<3"), ("x<3", r"(-\infty,3)"), ("x>3", r"(3,\infty)"), (r"x \ge 3", r"[3,+\infty)"),
    (r"a \leq -2 \text{ or } a = 1", r"(-\infty,-2] \cup \{1\}"), (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2"), ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"),
    (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)"), (r"\{x \mid x<1 \text{ or } x>2\}", r"(-\infty,1)\cup(2,\infty)"),
    ("0<x<3", r"x \in (0,3)"), (r"0<a\leq\frac{1}{2}", r"(0,\frac12]"), (r"-2 \le m \le 2\sqrt{2}", r"[-2,2\sqrt{2}]"),
    (r"k>2 \text{ or } k<-2", r"k<-2 \text{ or } k>2"), (r"k \in (-\infty,-2)\cup(2,+\infty)", "|k|>2"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"(-\infty,\infty)", r"\text{all real numbers}"), (r"\text{all real numbers}", r"\mathbb{R}"),
    (r"x \in \mathbb{R}", r"\mathbb{R}"), (r"\emptyset", r"\text{no solution}"), (r"\text{No solution}", r"\text{no solutions}"),
    (r"\text{No real solutions}", r"\emptyset"), (r"x = k\pi", r"n\pi"),
    (r"x=\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", r"\frac{\pi}{4}+k\pi"),
    (r"x=\frac{\pi}{4}+k\pi (k\in\mathbb{Z})", r"\frac{\pi}{4}+n\pi, n \in \mathbb{Z}"),
    (r"x=\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", r"x = \frac{\pi}{4}+k\pi \text{ for } k \in \mathbb{Z}"),
    (r"\text{Yes}", r"\text{Yes, it is}"), ("Yes", "yes"), ("No", r"\text{No}"), ("ABD", "A, B, D"), ("A, C, D", "ACD"), ("②③", "②, ③"),
    ("②③", "2, 3"), ("15", "15th"), (r"\text{infinitely many}", r"\infty"), ("y=2x+1", "2x-y+1=0"),
    (r"\frac{x^2}{4}+\frac{y^2}{3}=1", "3x^2+4y^2=12"), ("x^2+y^2=4", "x^2 + y^2 - 4 = 0"),
    (r"(0,1) \text{ and } (2,3)", "(2,3), (0,1)"), ("A(1,2)", "(1,2)"), ("(1,2)", "A(1,2)"), ("(1,2)", "(x,y)=(1,2)"),
    ("(1,2)", "P = (1,2)"), ("$10,20$", r"10 \text{ and } 20"), ("7,4", r"7 \text{ apples and } 4 \text{ pears}"), (r"12\%", "0.12"),
    (r"\$5", "5"), ("5 dollars", r"\$5"), ("5", r"5\text{ (dollars)}"), ("5", r"5 \text{ square units}"), ("60", r"60\degree"),
    (r"60^{\circ}", r"60 \text{ degrees}"), ("60 degrees", r"60^\circ"), ("3:4", r"\frac34"), ("3:4:5", "3 : 4 : 5"), ("n!", "n!"),
    (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), ("2^{n}-1", "2^n - 1"), ("n^2-n+1", "a_n = n^2-n+1"), ("a_n=2n-1", "2n-1"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"), ("10^{-3}", "0.001"), ("1{,}000", "1000"), ("1,000,000", "10^6"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\text{(A)}", "A"),
    ("A", r"\textbf{(A)}"), (r"1 \text{ or } 2", "2, 1"), ("21 or 11 or 16", "11, 16, 21"), (r"x=1 \text{ or } x=-2", "x = -2, 1"),
    ("m=2, n=-1", r"m = 2 \text{ and } n = -1"), ("k=1, b=-2", "(1,-2)"), (r"\sqrt{5}-1", r"-1+\sqrt{5}"),
    ("2,3,5,7", r"2, 3, 5, \text{ and } 7"), (r"30^{\circ}, 60^{\circ}, 90^{\circ}", "30, 60, 90"),
    (r"8 \text{ hours and } 30 \text{ minutes}", "8 hours and 30 minutes"), ("f(x)=-x^2+2", "-x^2+2"),
    (r"f(x) = x^2 \text{ or } f(x) = 0", "f(x)=0, f(x)=x^2"), ("n=3", r"\text{only } n = 3"), ("3", r"\text{only } 3"),
    (r"x=3 \text{ (double root)}", "3"), ("(3,-1)", r"\left( 3 ;\, -1 \right)"), (r"\frac{\pi}{2}", r"\frac{\pi}{2} \text{ radians}"),
    (r"\frac{\pi}{2}", r"90^{\circ}"), (r"3.5 \times 10^{4}", "35000"), ("n(n+1)", "n^2 + n"), ("1+2i", "2i+1"),
    ("e^{2}", r"\mathrm{e}^2"), (r"\frac{1}{2}\ln 2", r"\ln\sqrt{2}"), (r"C=\frac{1}{2}", "1/2"), ("(-1,3]", r"-1 < x \leq 3"),
    (r"\{1,2\}", r"1 \text{ and } 2"), (r"\{(1,2),(2,1)\}", "(1,2),(2,1)"), (r"\{-1,0\}", r"x \in \{-1, 0\}"), ("x=-1,0", "-1, 0"),
    ("a=1,b=2,c=3", "1,2,3"), ("a=1,b=2,c=3", "(a,b,c) = (1,2,3)"),
    (r"x=2 \text{ or } x=-3", r"\{2,-3\}"), ("2", r"\text{2 km}"), ("18", r"18\text{ years old}"),
    (r"\frac{1}{3}", r"\frac{1}{3} \text{ of the pizza}"), (r"\$12.50", r"12.50 \text{ dollars}"), ("12.5", r"\$12.50"),
    ("1500", r"1.5 \times 10^3"), (r"\text{Monday}", "Monday"), (r"\text{3 hours}", "3"), (r"3 \text{ hours}", r"3\text{ h}"),
    ("A=2,B=3", "A = 2, B = 3"), ("A=2;B=3", "(2,3)"), ("(a,b)=(2,3)", "a=2, b=3"), ("a=2, b=3", "(a, b) = (2, 3)"),
    (r"(a, b) = (2, 3) \text{ or } (3, 2)", "(2,3), (3,2)"), (r"x=1,y=2 \text{ or } x=2,y=1", "(1,2),(2,1)"),
    (r"(x, y)=(1,2) \text { or }(2,1)", "(1, 2), (2, 1)"), ("$(1,2)$ and $(2,1)$", "(1,2), (2,1)"), ("(1,2,3)", "(x,y,z)=(1,2,3)"),
    ("x=1, y=2, z=3", "(1, 2, 3)"), (r"f(x)=x \text{ or } f(x)=0", r"f(x) = 0 \text{ and } f(x) = x"), ("f(x)=c x", "f(x) = cx"),
    ("P(x)=x^n", "x^n"), ("n^2", "f(n)=n^2"), ("y = x^2 + 1", "x^2+1"), ("S=12", r"12 \text{ square units}"),
    (r"\frac{25\sqrt{3}}{4} \text{ cm}^2", r"\frac{25\sqrt{3}}{4}"), (r"\frac{25\sqrt{3}}{4} \mathrm{~cm}^{2}", r"\frac{25 \sqrt 3}{4}"),
    (r"120^{\circ}", r"120^\circ"), (r"\angle A = 60^{\circ}", r"60^\circ"),
    (r"\angle A=60^{\circ}, \angle B=90^{\circ}", r"60^\circ, 90^\circ"),
    (r"90^{\circ}, 60^{\circ}, 30^{\circ}", r"30^\circ, 60^\circ, 90^\circ"), (r"\overline{AB}=5", "5"),
    (r"\left|AB\right| = \sqrt{5}", r"\sqrt{5}"), (r"|z|=\sqrt{2}", r"\sqrt{2}"), ("z=1+i", "1+i"), ("1+i, 1-i", r"1 \pm i"),
    (r"z = 1 \pm i", "1+i, 1-i"), (r"\pm 3", "3, -3"), ("-3, 3", r"x = \pm 3"), (r"\{3,-3\}", r"\pm 3"), (r"m \in (0,1)", "0<m<1"),
    (r"m<-1 \text{ or } m>\frac{1}{2}", r"(-\infty,-1)\cup(\frac12,+\infty)"),
    (r"(-\infty,-1)\cup(\frac{1}{2},+\infty)", r"m \in (-\infty,-1) \cup (1/2, \infty)"), ("a>1", r"(1,+\infty)"),
    (r"\left\{a \mid a>1\right\}", "a > 1"), (r"\{x|x>1\}", r"(1,\infty)"), (r"\{x \in \mathbb{R} | x \neq 0\}", r"x \neq 0"),
    (r"\mathbb{R} \backslash\{0\}", r"x \ne 0"), (r"x \in \mathbb{R}, x \neq 1", r"x \neq 1"),
    (r"(-\infty, 0) \cup(0, \infty)", r"\mathbb{R}\setminus\{0\}"), (r"1<x<2 \text{ or } x>3", r"(1,2)\cup(3,\infty)"),
    (r"0 \leq x \leq 1", "[0,1]"), ("[0,1]", r"0 \le x \le 1"), (r"x\leq -2 \text{ or } x \geq 2", r"|x| \ge 2"),
    ("(2, 3]", r"2 < a \leq 3"), (r"n \geq 3", r"n \ge 3"), ("n>2", "n > 2"), ("k=1,2,3", "1,2,3"), ("n=1,2,3", r"\{1,2,3\}"),
    (r"n \in\{1,2,3\}", "1, 2, 3"), ("1, 2, 3, 6", "6, 3, 2, 1"), (r"x=\frac{\pi}{6}+2k\pi, k \in \mathbb{Z}", r"\frac{\pi}{6}+2k\pi"),
    (r"x=\frac{\pi}{3}+2 k \pi(k \in \mathbf{Z})", r"x = 2n\pi + \frac{\pi}{3}"),
    (r"\left[k \pi-\frac{\pi}{12}, k \pi+\frac{5 \pi}{12}\right], k \in \mathbb{Z}", r"[k\pi - \frac{\pi}{12}, k\pi+\frac{5\pi}{12}]"),
    (r"\left[k \pi-\frac{\pi}{12}, k \pi+\frac{5 \pi}{12}\right](k \in \mathbb{Z})",
     r"[-\frac{\pi}{12} + n\pi, \frac{5\pi}{12}+n\pi], n \in \mathbb{Z}"),
    (r"\frac{\sqrt{3}}{2} \approx 0.866", r"\frac{\sqrt{3}}{2}"), (r"\approx 3.14", "3.14"), (r"x \approx 2.35", "2.35"),
    ("2.35", r"x \approx 2.35"), (r"10\sqrt{2} \approx 14.1", "14.1"), ("14.1", r"10\sqrt{2}"), ("0.3333333333", r"\frac13"),
    ("2.6666666666666665", r"\frac{8}{3}"), (r"\frac{8}{3}", "2.6666666666666665"), (r"\frac{22}{7}", "3.142857142857143"),
    (r"33.33\%", r"\frac{1}{3}"), ("0.333", r"\frac13"), (r"50\%", "0.5"), (r"\frac{3}{8}", r"37.5\%"), ("2:3", r"\frac{2}{3}"),
    ("2:3", "2 : 3"), ("1:2:3", "1 : 2 : 3"), (r"\frac{2}{3}", "2:3"), ("12:30", "12:30"),
    (r"\text{Yes}", r"\text{Yes, it is possible}"), (r"\text{no}", "No."), (r"\text{True}", "True"),
    (r"\text{impossible}", "Impossible"), (r"\text{even}", r"\text{The function is even}"), (r"\text{parabola}", "a parabola"),
    (r"\text{an ellipse}", "ellipse"), (r"\text{isosceles triangle}", r"\text{an isosceles triangle}"),
    ("the second quadrant", r"\text{second quadrant}"), (r"\text{infinitely many solutions}", r"\text{infinitely many}"),
    (r"\text{does not exist}", r"\text{DNE}"), (r"\varnothing", r"\emptyset"), (r"\text{(B) and (C)}", "B, C"), ("B,C", "BC"),
    ("①③④", "①, ③, ④"), (r"-\infty", r"-\infty"), (r"\begin{cases} x=1 \\ y=2 \end{cases}", "(1,2)"),
    (r"\left\{\begin{array}{l} x=1 \\ y=2 \end{array}\right.", "x=1, y=2"), (r"\begin{array}{l}x=1\\y=2\end{array}", "x=1,y=2"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\langle 1,2,3 \rangle", "(1,2,3)"), (r"\vec{a}=(1,2)", "(1,2)"), (r"1\mathbf{i}+2\mathbf{j}", "i+2j"), ("x+2y-3=0", "x + 2y = 3"),
    (r"y=\frac{1}{2}x+1", "x-2y+2=0"), ("y = 2x", "2x - y = 0"), ("(x-1)^2+(y+2)^2=4", "(x - 1)^2 + (y + 2)^2 = 4"),
    ("x^2+y^2-2x=0", "(x-1)^2+y^2=1"), ("y^2=4x", r"x = \frac{y^2}{4}"), ("a_n=2^n", "2^{n}"), ("a_{n}=n(n+1)", "n^2+n"),
    ("2^{n-1}", r"\frac{2^n}{2}"), ("n!", r"n \cdot (n-1)!"), (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
    (r"\frac{n(n-1)}{2}", r"\dbinom{n}{2}"), (r"\log_{2}{8}", "3"), ("e^{-1}", r"\frac{1}{e}"), (r"\ln 3 - \ln 2", r"\ln\frac{3}{2}"),
    (r"\tan^{-1}(2)", r"\arctan 2"), (r"\sin^2 x", r"1-\cos^2 x"), (r"\lfloor n/2 \rfloor", r"\left\lfloor \frac{n}{2} \right\rfloor"),
    (r"\left\lceil \frac{n}{2}\right\rceil", r"\lceil n/2 \rceil"), (r"20 \text{ and } 30", "30, 20"), ("x^2 - x + C", "x^2 - x + C"),
    (r"\frac{x^2}{2}+C", r"\frac{1}{2}x^2 + C"), (r"\frac{1}{2}", r"P = \frac{1}{2}"), (r"\frac{1}{2}", "P(A) = 0.5"), ("17", "n = 17"),
    ("17", r"\mathbf{17}"), ("17", r"\underline{17}"), ("17", r"{\bf 17}"), ("17", "17_{10}"), ("17", r"\textbf{17}"),
    ("17", r"17 \quad"), ("17", r"\text{The answer is } 17"), ("17", r"\text{Answer: } 17"), ("17", "approximately 17"),
    ("17", r"\approx 17"), (r"2^{31} \cdot 3", r"3 \cdot 2^{31}"), ("2^{2021}-1", "2^{2021} - 1"), ("10^{100}", "10^{100}"),
    (r"\frac{3}{2}, -\frac{1}{2}", r"-\frac12, \frac32"), (r"2 \sqrt{2}+3", r"3 + 2\sqrt{2}"), ("(0,-2),(0,2)", r"(0, \pm 2)"),
    (r"(\pm 1, 0)", "(1,0),(-1,0)"),
]  # fmt: skip

WRONG_FORMS = [
    ("p=7,q=3", "(3,7)"), ("p=7,q=3", "p=3, q=7"), ("p=7,q=3", "3,7"), ("p=7,q=3;p=11,q=3", "(3,7),(3,11)"),
    ("p=7,q=3;p=11,q=3", "(7,3)"), ("p=7,q=3;p=11,q=3", "(7,11),(3,3)"), ("(7,3)", "p=3, q=7"), ("(7,3)", "3,7"), ("a=4", "a=5"),
    ("a=4", "4,5"), ("a=4", "b=4"), ("x=3", "y=3"), ("|CD|=6", "7"), ("g(x)=2", r"g(x) = 3 \text{ for all } x"),
    ("g(x)=2", r"g(x) = x \text{ for all } x"), (r"\frac{3+\sqrt{41}}{7} \approx 1.34", r"\frac{4+\sqrt{41}}{7}"),
    (r"\frac{7}{9}", r"\frac{7}{8} \approx 0.78"), (r"\frac{7}{9}", r"\frac{7}{9} \approx 0.98"), (r"\frac{7}{9}", "0.78"),
    ("1/7", "0.142857"), ("1/7", "0.1428571428571439"), ("2,-2,9,-9", "-9,-2,2,8"), ("2,-2,9,-9", "-9,-2,2"), ("5, 12, 3", "12, 5, 3"),
    ("4, 10, -2", "10, 4, -2"), (r"(-\infty,3)", r"x \le 3"), (r"(-\infty,3)", "x>3"), ("(0,3)", r"0 \le x < 3"),
    (r"a \leq -2 \text{ or } a = 1", r"(-\infty,-2)\cup\{1\}"), (r"x<1 \text{ or } x>2", "(1,2)"),
    (r"x<1 \text{ or } x>2", r"(-\infty,1]\cup(2,\infty)"), (r"x \neq 2", "x = 2"), (r"\mathbb{R}", r"(0,\infty)"),
    (r"x = k\pi", r"2n\pi"), (r"x=\frac{\pi}{4}+k\pi", r"\frac{\pi}{3}+n\pi"), (r"\text{Yes}", "No"), ("ABD", "A, B"), ("ABD", "A,C,D"),
    ("12", "12x"), ("12", "13 km"), ("12 km", "13"), ("12x", "12"), ("3n", "3"), ("2,3", "6"), ("(1,2)", "(2,1)"), ("(1,2)", "A(2,1)"),
    ("1.34", r"\frac{4+\sqrt{41}}{7}"), ("9.42", r"\pi"), ("14.29", "14.2957142857"), ("x<3", "3"), ("x>3", "3"),
    ("0", r"\text{no solution}"), ("5", "-5"), ("x^2+y^2=4", "4"), ("y=2x+1", "y=2x-1"), ("f(x)=x+1", "x"), ("3", "3,3"),
    (r"\{1,2\}", "1"), ("a=1,b=2,c=3", "3,2,1"), ("a=1,b=2,c=3", "a=3,b=2,c=1"), (r"k \in (-\infty,-2)\cup(2,+\infty)", "|k|<2"),
    (r"\frac{1}{2}", r"\frac{1}{2}, \frac{1}{3}"), ("10", r"x \approx 10.2"), (r"x=1 \text{ or } x=-2", "1"), ("m", "5m"),
    ("5m+3", "5+3"), ("15", "16th"), ("[0,1]", "(0,1)"), ("2", "x_2"), ("x_1=1,x_2=2", "1,3"), ("6", "|CD|"),
    ("(7,3),(11,3)", "(x,y) = (7,3)"),
    (r"(-\infty, 0) \cup(0, \infty)", r"\mathbb{R}"), (r"\text{even}", r"\text{odd}"), (r"\text{even}", r"\text{The function is odd}"),
    (r"x \neq 1", r"x \neq 2"), ("12", "12:30"), ("2:3", "3:2"), ("1:2:3", "1:3:2"), ("B,C", "B,D"), (r"33.33\%", r"\frac{1}{4}"),
    ("f(x)=cx", "f(x)=cx+1"), ("x+2y-3=0", "x+2y=4"), ("(1,2)", "x=2, y=1"), ("(1,2),(2,1)", "(1,2)"), ("a=2, b=3", "(a,b)=(3,2)"),
    ("(a,b)=(2,3)", "a=3, b=2"), (r"\angle A=60^{\circ}, \angle B=90^{\circ}", r"90^\circ, 60^\circ"), (r"n \geq 3", "n > 3"),
    (r"n \geq 3", "3"), ("[0,1]", "0 < x < 1"), (r"x=\frac{\pi}{6}+2k\pi", r"\frac{\pi}{6}+k\pi"), (r"\frac{8}{3}", "2.66"),
    (r"\frac{8}{3}", "2.6666"), ("14.1", r"10\sqrt{3}"), ("10", r"10\sqrt{2}"), ("1+i", "1-i"), ("1+i,1-i", "1+i"),
    (r"\text{Yes}", r"\text{No, it is not}"), (r"\text{Monday}", r"\text{Tuesday}"), (r"\text{an ellipse}", r"\text{a hyperbola}"),
    (r"\text{isosceles triangle}", r"\text{triangle}"), (r"2^{31} \cdot 3", "2^{31}"), ("17", r"\text{The answer is } 18"),
    (r"\begin{cases} x=1 \\ y=2 \end{cases}", "(2,1)"), (r"\lfloor n/2 \rfloor", r"\lceil n/2 \rceil"), ("a_n=2^n", "2^{n+1}"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "found"), RIGHT + RIGHT_FORMS)
def test_right(gold, found):
    assert verdict(gold, f"\\boxed{{{found}}}").score == 1.0


@pytest.mark.parametrize(("gold", "found"), WRONG + WRONG_FORMS)
def test_wrong(gold, found):
    graded = verdict(gold, f"\\boxed{{{found}}}")
    assert graded.score == 0.0


@pytest.mark.parametrize("between", [" and ", ", ", " ", r"\text{ or }", r"$ and $"])
def test_joined_boxes_are_one_answer_of_several_parts(between):
    assert verdict("9", rf"\boxed{{8}}{between}\boxed{{9}}") == (0.0, "8, 9", "")
    assert verdict("8,9", rf"$\boxed{{8}}{between}\boxed{{9}}$").score == 1.0
    assert verdict("(2,5),(4,1)", rf"\boxed{{(4,1)}}{between}\boxed{{(2,5)}}").score == 1.0


def test_the_order_of_a_list_counts_where_the_problem_asks_for_it():
    for ordered, score in ((True, 0.0), (False, 1.0), (None, 0.0)):
        assert verdict("5,12,3", r"\boxed{12,5,3}", ordered=ordered).score == score
    assert verdict("1,2", r"\boxed{2,1}", ordered=True).score == 0.0
    for ordered in (True, False, None):
        assert verdict("(1,2)", r"\boxed{(2,1)}", ordered=ordered).score == 0.0
        assert verdict("5,12,3", r"\boxed{5,12,3}", ordered=ordered).score == 1.0


@pytest.mark.parametrize(
    ("gold", "found", "strict"),
    [
        ("56088", r"123 \cdot 456", 0.0), ("56088", r"\boxed{56088}", 1.0), ("1024", "2^{10}", 0.0),
        ("120", "5!", 0.0), ("3", r"\sqrt{9}", 0.0),
        ("4", r"4\%", 0.0), ("0.04", r"4\%", 1.0), (r"4\%", "0.04", 1.0), (r"4\%", "4", 0.0), (r"4\%", r"4\%", 1.0),
        ("0.5", r"\frac12", 1.0),
        ("2.5", r"2\frac12", 1.0), ("5000", r"5\times 10^3", 1.0), ("x=6", "6", 1.0), ("6", r"x = 2\cdot 3 = 6", 1.0),
        (r"\sqrt{8}", r"2\sqrt2", 1.0),
        ("2,6", r"2, 2\cdot 3", 0.0), ("2^{10}", "2^{10}", 1.0), ("5", "5 km", 1.0),
    ],
)  # fmt: skip
def test_strictly_a_number_is_given_as_a_number(gold, found, strict):
    completion = found if "boxed" in found else f"\\boxed{{{found}}}"
    assert verdict(gold, completion).score == 1.0
    assert verdict(gold, completion, judge=answer.MATH_STRICT).score == strict


@pytest.mark.parametrize(
    "found",
    [
        "9^{9^{9}}",
        "2^{99999999}",
        "1.5^{100000000}",
        "1e99999999",
        "99999999!",
        "((9!)!)!",
        r"\binom{99999999}{5}",
        r"\sum_{k=1}^{99999999} k",
        r"\frac{1}{1+" * 200 + "1" + "}" * 200,
        "x+" * 3000 + "x",
        "7" * 3000 + "x",
        r"\begin{pmatrix}" + "&".join("1" * 200) + r"\end{pmatrix}",
    ],
)
def test_what_is_too_large_is_refused_and_scores_zero(found):
    graded = verdict("5", f"\\boxed{{{found}}}")
    assert graded.score == 0.0
    assert graded.error.startswith(answer.REFUSED)


def test_harmless_depth_and_signs_are_seen_through():
    assert verdict("3", "\\boxed{" + "(" * 3000 + "3" + ")" * 3000 + "}").score == 1.0
    assert verdict("3", "\\boxed{" + "{" * 20000 + "3" + "}" * 20000 + "}").score == 1.0
    assert verdict("3", "\\boxed{" + "-" * 4000 + "3}").score == 1.0
    assert verdict("3", "\\boxed{" + "-" * 4001 + "3}").score == 0.0
    assert verdict("3", "\\" * 50000 + "boxed{3}").score == 1.0


def test_without_a_gold_answer_there_is_no_verdict():
    assert verdict("", r"\boxed{5}") == (None, "5", answer.GOLD_MISSING) or verdict("", r"\boxed{5}").score is None
    assert verdict("  ", "no box").error == answer.GOLD_MISSING
    unread = verdict(r"\frac{1}{", r"\boxed{5}")
    assert unread.score is None
    assert unread.error.startswith(answer.GOLD_UNPARSABLE)
    assert verdict(r"\frac{1}{", "no box").score is None
    assert verdict("9^{9^{9}}", r"\boxed{5}").error.startswith(answer.GOLD_UNPARSABLE)


def test_without_an_answer_the_score_is_zero_and_says_so():
    for completion in ("five", r"\boxed{}", r"<think> \boxed{5}"):
        graded = verdict("5", completion)
        assert graded.score == 0.0
        assert graded.error.startswith(answer.NO_ANSWER)
    assert verdict("5", r"\boxed{5}", thinking=True).score == 0.0


def test_a_wrong_answer_is_no_error():
    assert verdict("5", r"\boxed{6}") == (0.0, "6", "")


def test_exact_compares_letters():
    assert verdict("x+1", r"\boxed{x + 1}", judge=answer.EXACT).score == 1.0
    assert verdict("x+1", r"\boxed{1+x}", judge=answer.EXACT).score == 0.0
    assert verdict(r"\frac{1}{", r"\boxed{5}", judge=answer.EXACT).score == 0.0


def test_what_was_extracted_is_bounded():
    assert len(verdict("5", "\\boxed{" + "9" * 10**6 + "}").extracted) < 2000


def test_progress_is_told_once_the_gold_answer_is_understood():
    told = []
    answer.grade("5", r"\boxed{\sqrt{26}}", False, judge=answer.MATH, lenient=False, progress=lambda *note: told.append(note))
    assert told == [(True, r"\sqrt{26}")]
    told.clear()
    answer.grade(r"\frac{3}{", r"\boxed{6}", False, judge=answer.MATH, lenient=False, progress=lambda *note: told.append(note))
    assert told == []
